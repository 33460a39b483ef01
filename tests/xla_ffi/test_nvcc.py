"""Compiles the CUDA decoders for every supported architecture; needs nvcc, but no GPU."""

import re
import subprocess

import count_sass
import pytest
from compiling import ROOT, needs_nvcc, needs_nvdisasm

ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]


# Registers and bytes of static shared memory, which ends at 48 KB, that each kernel may take. Pairs
# of chunks are decoded by one block, of 8 warps or of 2, a multiprocessor.
KERNELS = {
    "native": {"decode_kernel": (80, 48 * 1024), "bulk_decode_kernel": (255, 0)},
    "published": {"decode_kernel": (80, 0)},
}


@needs_nvcc
@pytest.mark.parametrize("layout", KERNELS)
def test_no_spills(layout, tmp_path):
    command = [count_sass.find_tool("nvcc"), "-std=c++17", "-Werror", "all-warnings", "-fatbin"]
    command += ["-Xptxas", "-v", "--threads", "2", f"-I{ROOT / 'xla_ffi'}"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-o", tmp_path / "decode.fatbin", ROOT / "xla_ffi" / layout / "cuda" / "decode.cu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    # Per architecture, ptxas prints the kernel's name, then its stack frame, then the rest.
    reports = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        result.stderr,
        re.DOTALL,
    )
    assert {(r[1], kernel_of(r[0])) for r in reports} == {
        (arch, kernel) for arch in ARCHITECTURES for kernel in KERNELS[layout]
    }, result.stderr
    for name, arch, frame, stores, loads, registers, rest in reports:
        kernel = kernel_of(name)
        most_registers, most_shared = KERNELS[layout][kernel]
        shared = int(next(iter(re.findall(r"(\d+) bytes smem", rest)), 0))
        print(f"sm_{arch}: {kernel}: {registers} registers, {shared} bytes of static shared memory")
        assert (frame, stores, loads) == ("0", "0", "0"), f"sm_{arch} spills"
        assert int(registers) <= most_registers
        assert shared <= most_shared


def kernel_of(mangled_name):
    return re.search(r"(bulk_)?decode_kernel", mangled_name)[0]


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", count_sass.BULK_ARCHITECTURES)
def test_instructions_per_weight_of_pairs(arch):
    instructions, weights, _ = count_sass.count_bulk(arch)
    print(f"sm_{arch}: {instructions / weights:.2f} per weight")
    assert instructions / weights <= 8


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", count_sass.ARCHITECTURES)
def test_instructions_per_weight(arch):
    instructions, weights, _ = count_sass.count(arch)
    print(f"sm_{arch}: {instructions / weights:.2f} per weight")
    assert weights == 32
    assert instructions / weights <= 10


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", count_sass.ARCHITECTURES)
def test_instructions_per_published_weight(arch):
    loops = {name: n / weights for name, n, weights, _ in count_sass.count_published(arch)}
    print(f"sm_{arch}:", ", ".join(f"{name} {n:.2f}" for name, n in loops.items()))
    # 26 are what an H200 can issue while it moves a weight, and a third are outside of the loops.
    assert sum(loops.values()) <= 16
