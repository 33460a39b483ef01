"""Runs the C++ encoder, CPU decoder and transpose under sanitizers: the sources say on what."""

import pytest
from compiling import SANITIZERS, needs_compiler, run_under

pytestmark = pytest.mark.slow


@needs_compiler
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_codec(sanitizer, tmp_path):
    run_under(sanitizer, tmp_path, ["tests/xla_ffi/native/codec_test.cc"])


@needs_compiler
def test_transpose(tmp_path):
    """Built for aarch64, it runs in tools/aarch64.sh."""
    run_under("address,undefined", tmp_path, ["tests/xla_ffi/native/transpose_test.cc"])
