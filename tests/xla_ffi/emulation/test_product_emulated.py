"""Runs the fused product on the host, under sanitizers: see cuda_runtime.h."""

import pytest
from compiling import SANITIZERS, needs_compiler, run_under
from test_kernel_emulated import ARGUMENTS

pytestmark = pytest.mark.slow


@needs_compiler
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_product(sanitizer, tmp_path):
    arguments = [*ARGUMENTS, "tests/xla_ffi/native/product_test.cc"]
    arguments += ["-x", "c++", "xla_ffi/native/cuda/product.cu"]
    run_under(sanitizer, tmp_path, arguments, standard="c++20")
