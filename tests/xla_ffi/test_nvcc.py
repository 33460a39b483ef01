"""Compiles the CUDA decoders for an architecture of each kind; needs nvcc, but no GPU."""

import re

import count_sass
import pytest
from compiling import needs_nvcc, needs_nvdisasm, ptxas_report

pytestmark = pytest.mark.slow

ARCHITECTURES = ["75", "80", "90", "100", "120"]


# Registers and bytes of static shared memory, which ends at 48 KB, that each kernel may take. A
# multiprocessor has one block, of 8 warps or of 2, that decodes groups of chunks.
KERNELS = {
    "native": {"decode_kernel": (80, 48 * 1024), "bulk_decode_kernel": (255, 0)},
    "published": {"decode_kernel": (80, 0)},
}


@needs_nvcc
@pytest.mark.parametrize("layout", KERNELS)
def test_no_spills(layout, tmp_path):
    report = ptxas_report(f"{layout}/cuda/decode.cu", ARCHITECTURES, tmp_path)
    reports = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    assert {(r[1], kernel_of(r[0])) for r in reports} == {
        (arch, kernel) for arch in ARCHITECTURES for kernel in KERNELS[layout]
    }, report
    for name, arch, frame, stores, loads, registers, rest in reports:
        kernel = kernel_of(name)
        most_registers, most_shared = KERNELS[layout][kernel]
        shared = int(next(iter(re.findall(r"(\d+) bytes smem", rest)), 0))
        of = "".join(f", {n}" for n in re.findall(r"Li(\d+)E", name))  # warps, chunks
        print(f"sm_{arch}: {kernel}{of}: {registers} registers, {shared} bytes of shared memory")
        assert (frame, stores, loads) == ("0", "0", "0"), f"sm_{arch} spills"
        assert int(registers) <= most_registers
        assert shared <= most_shared


def kernel_of(mangled_name):
    return re.search(r"(bulk_)?decode_kernel", mangled_name)[0]


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize(("chunks", "most"), [(2, 8), (1, 9)])
@pytest.mark.parametrize("arch", count_sass.BULK_ARCHITECTURES)
def test_instructions_per_weight_of_groups(arch, chunks, most):
    instructions, weights, _ = count_sass.count_bulk(arch, chunks)
    print(f"sm_{arch}: {instructions / weights:.2f} per weight")
    assert instructions / weights <= most


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("chunks", count_sass.BULK_CHUNKS)
@pytest.mark.parametrize("arch", count_sass.BULK_ARCHITECTURES)
def test_copies_of_groups_wait(arch, chunks):
    """For what they overwrite."""
    loop = count_sass.bulk_loop(arch, chunks)
    assert count_sass.copies_wait(loop, 2 * chunks), "after_loads has no effect"


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
