"""Runs the CUDA decoders as fibers on the host, under sanitizers: see cuda_runtime.h."""

import platform

import pytest
from compiling import SANITIZERS, build_under, needs_compiler, run_program, run_under

pytestmark = pytest.mark.slow

ARGUMENTS = ["-Itests/xla_ffi/emulation", "-Wno-unknown-pragmas", "-Wno-psabi"]
# The kernels read words two and four at a time.
ARGUMENTS += ["-fno-strict-aliasing"]


@needs_compiler
def test_what_is_left_out_is_noticed(tmp_path):
    arguments = [*ARGUMENTS, "tests/xla_ffi/emulation/async_copies_test.cc"]
    run_under("plain", tmp_path, arguments, standard="c++20")


@needs_compiler
@pytest.mark.parametrize(
    ("sanitizer", "faults"),
    [
        (
            "thread",
            {
                "race within a warp": "data race",
                "race across a shuffle": "data race",
                "race between warps": "data race",
                "race across another barrier": "data race",
            },
        ),
        # Elsewhere, fibers are changed by what makes it forget the stack: see fibers.h.
        pytest.param(
            "address,undefined",
            {"overflow": "stack-buffer-overflow"},
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64"),
        ),
    ],
)
def test_sanitizers_see_into_fibers(sanitizer, faults, tmp_path):
    arguments = [*ARGUMENTS, "tests/xla_ffi/emulation/fibers_test.cc"]
    program = build_under(sanitizer, tmp_path, arguments, standard="c++20")
    assert run_program(program, "none").returncode == 0
    for fault, message in faults.items():
        result = run_program(program, fault)
        assert result.returncode != 0 and message in result.stderr, fault


# Against the CPU decoder for the native layout, against one in the test for the published one.
@needs_compiler
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("layout", ["native", "published"])
def test_kernel(layout, sanitizer, tmp_path):
    # Two warps a block, because eight are slow.
    arguments = [*ARGUMENTS, "-DDF11_DECODE_WARPS=2"]
    arguments += [f"tests/xla_ffi/{layout}/kernel_test.cc"]
    arguments += ["-x", "c++", f"xla_ffi/{layout}/cuda/decode.cu"]
    run_under(sanitizer, tmp_path, arguments, standard="c++20")
