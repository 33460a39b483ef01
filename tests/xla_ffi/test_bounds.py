"""What the CUDA decoder takes of a GPU, and what binds it: computed without one."""

import bounds
import pytest
from compiling import needs_nvcc, needs_nvdisasm


@pytest.mark.slow
@needs_nvcc
def test_resources():
    took = bounds.resources("90")
    print(took, took.blocks("90"))
    assert (took.stack_bytes, took.spilled_bytes) == (0, 0)
    assert took.blocks("90") >= 3


@pytest.mark.slow
@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("name", bounds.GPUS)
def test_bound_by_memory(name):
    gpu = bounds.GPUS[name]
    instructions, weights, units = bounds.count(gpu.arch)
    limits = bounds.limits(gpu, instructions / weights, units["integer"] / weights)
    print(name, limits)
    assert min(limits, key=limits.get) == "memory"


def test_blocks():
    def blocks(arch, registers, shared):
        return bounds.Resources(registers, shared, 0, 0).blocks(arch)

    assert blocks("90", 64, 0) == 4  # 65,536 registers
    assert blocks("90", 65, 0) == 3  # counts as 72
    assert blocks("90", 32, 0) == 8  # 2,048 threads
    assert blocks("80", 32, 40 * 1024) == 4  # 164 KB of shared memory
    assert blocks("80", 32, 40 * 1024 + 1) == 3
