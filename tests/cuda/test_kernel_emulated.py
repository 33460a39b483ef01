"""Runs the CUDA decoders on host threads, under sanitizers: see xla_ffi/cuda/emulation."""

import pytest
from compiling import FLAGS, needs_compiler, run_under


# Against the CPU decoder for the native layout, against one in the driver for the published one.
@needs_compiler
@pytest.mark.parametrize("sanitizer", FLAGS)
@pytest.mark.parametrize(
    ("driver", "source"), [("kernel_test", "decode"), ("published_kernel_test", "published")]
)
def test_kernel(driver, source, sanitizer, tmp_path):
    arguments = ["-Ixla_ffi/cuda/emulation", "-Wno-unknown-pragmas"]
    # The kernels read words two and four at a time.
    arguments += ["-fno-strict-aliasing"]
    # Two warps a block, because a host thread for each of 256 is slow.
    arguments += ["-DDF11_DECODE_WARPS=2"]
    arguments += [f"tests/cuda/{driver}.cc", "-x", "c++", f"xla_ffi/cuda/{source}.cu"]
    run_under(sanitizer, tmp_path, arguments, standard="c++20")
