"""Runs the parallel loop short of memory and of threads: parallel_test.cc says where."""

import pytest
from compiling import SANITIZERS, needs_compiler, run_under


@needs_compiler
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_parallel(sanitizer, tmp_path):
    run_under(sanitizer, tmp_path, ["tests/xla_ffi/common/parallel_test.cc"])
