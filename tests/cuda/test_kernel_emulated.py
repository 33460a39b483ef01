"""Runs the CUDA decoder on host threads, under sanitizers: see xla_ffi/cuda/emulation."""

import pytest
from compiling import FLAGS, needs_compiler, run_under


@needs_compiler
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_kernel_matches_cpu_decoder(sanitizer, tmp_path):
    arguments = ["-Ixla_ffi/cuda/emulation", "-Wno-unknown-pragmas"]
    # The kernel reads words four at a time.
    arguments += ["-fno-strict-aliasing"]
    # Two warps a block, because a host thread for each of 256 is slow.
    arguments += ["-DDF11_DECODE_WARPS=2"]
    arguments += ["tests/cuda/kernel_test.cc", "-x", "c++", "xla_ffi/cuda/decode.cu"]
    run_under(sanitizer, tmp_path, arguments, standard="c++20")
