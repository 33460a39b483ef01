"""Compiles the fused product for the architectures that have it; needs nvcc, but no GPU."""

import re

import count_sass
import pytest
from compiling import needs_nvcc, needs_nvdisasm, ptxas_report

pytestmark = pytest.mark.slow

# Registers of a thread, of 65,536, by tiles of 8 rows: where bulk copies are, blocks have up to 28,
# 16 and 12 warps; where lanes copy, 16, 16 and 8.
MOST_REGISTERS = {
    "BulkCopies": {"1": 72, "2": 128, "4": 168},
    "LaneCopies": {"1": 128, "2": 128, "4": 255},
}


@needs_nvcc
def test_resources(tmp_path):
    # What is for other GPUs is an empty kernel.
    architectures = ("75", *count_sass.PRODUCT_ARCHITECTURES)
    report = ptxas_report("native/cuda/product.cu", architectures, tmp_path)
    reports = re.findall(
        r"Compiling entry function '\w+product_kernelILi(\d)E\w*?([A-Z][a-z]+Copies)\w+' "
        r"for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(reports) == (3 + 3 + 2) * len(architectures)
    for tiles, copies, arch, frame, spilled, registers in reports:
        used = None if arch == "75" else "LaneCopies" if arch.startswith("8") else "BulkCopies"
        assert (int(registers) > 10) == (copies == used)
        print(f"sm_{arch}, {tiles} tiles, {copies}: {registers} registers")
        assert int(registers) <= MOST_REGISTERS[copies][tiles]
        assert (frame, spilled) == ("0", "0")


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", count_sass.PRODUCT_ARCHITECTURES)
def test_inner_loop(arch):
    """Its instructions are within their budget; what it copies waits for what it overwrites."""
    for rows, loop in count_sass.product_loops(arch).items():
        per_step = len(loop) / 2
        print(f"sm_{arch}, {rows} rows of x: {per_step} instructions a step of 1,024 weights")
        more = 30 if arch == "80" else 0  # where lanes copy
        assert per_step <= {8: 175, 16: 180, 32: 205}[rows] + more
        assert not any(count_sass.opcode(i) in ("LDL", "STL") for i in loop), "spilled"
        assert count_sass.copies_wait(loop, 4), "after_loads has no effect"
