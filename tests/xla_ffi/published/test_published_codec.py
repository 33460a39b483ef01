"""Runs the published layout's codec under sanitizers: codec_test.cc says on what."""

import pytest
from compiling import SANITIZERS, needs_compiler, run_under

pytestmark = pytest.mark.slow


@needs_compiler
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_published_codec(sanitizer, tmp_path):
    run_under(sanitizer, tmp_path, ["tests/xla_ffi/published/codec_test.cc"])
