"""Runs the C++ encoder and CPU decoder under sanitizers: codec_test.cc says on what."""

import pytest
from compiling import needs_compiler, run_under

pytestmark = pytest.mark.slow


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_codec(sanitizer, tmp_path):
    run_under(sanitizer, tmp_path, ["tests/xla_ffi/native/codec_test.cc"])
