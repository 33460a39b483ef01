"""Compiles the fused product for the architectures that have it; needs nvcc, but no GPU."""

import re

import count_sass
import pytest
from compiling import needs_nvcc, needs_nvdisasm, ptxas_report

pytestmark = pytest.mark.slow

# Registers of a thread, of 65,536, where a block has 28, 16 and 12 warps.
MOST_REGISTERS = {"1": 72, "2": 128, "4": 168}


@needs_nvcc
def test_resources(tmp_path):
    # Where there are no bulk copies it is an empty kernel.
    architectures = ("75", "80", *count_sass.PRODUCT_ARCHITECTURES)
    report = ptxas_report("native/cuda/product.cu", architectures, tmp_path)
    reports = re.findall(
        r"Compiling entry function '\w+product_kernelILi(\d)E\w+' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(reports) == 3 * len(architectures)
    for tiles, arch, frame, registers in reports:
        print(f"sm_{arch}, {tiles} tiles: {registers} registers, {frame} bytes on the stack")
        assert int(registers) <= MOST_REGISTERS[tiles]
        assert int(frame) <= (32 if tiles == "1" else 0)


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", count_sass.PRODUCT_ARCHITECTURES)
def test_inner_loop(arch):
    """Its instructions are within their budget; what it copies waits for what it overwrites."""
    for rows, loop in count_sass.product_loops(arch).items():
        per_step = len(loop) / 2
        print(f"sm_{arch}, {rows} rows of x: {per_step} instructions a step of 1,024 weights")
        assert per_step <= {8: 175, 16: 180, 32: 205}[rows]
        assert not any(count_sass.opcode(i) in ("LDL", "STL") for i in loop), "spilled"
        assert count_sass.copies_wait(loop, 4), "after_loads has no effect"
