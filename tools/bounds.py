"""What the CUDA decoder takes of a GPU, and what it should be bound by: arithmetic, no GPU.

    python tools/bounds.py

First table: registers, shared memory and spills, by ptxas, and how many blocks a multiprocessor
therefore holds. Second table: how many weights per second each part of some GPUs could take. That
follows from the instructions per weight (tools/count_sass.py), from the bank conflicts
(tools/count_conflicts.py) and from data sheets; the least of them is the bound.

Needs nvcc and nvdisasm, from PATH or from pip (nvidia-cuda-nvcc, nvidia-cuda-nvdisasm).
"""

import argparse
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

from count_sass import ARCHITECTURES, ROOT, SOURCE, count, find_tool

# What a multiprocessor holds: threads, blocks, bytes of shared memory (CUDA programming guide).
# All have 65,536 registers, and take 1 KB of shared memory from each block for themselves.
MULTIPROCESSOR = {
    "80": (2048, 32, 164 * 1024),
    "90": (2048, 32, 228 * 1024),
    "100": (2048, 32, 228 * 1024),
}
REGISTERS = 65536
THREADS = 256  # of the decoder's blocks


class Gpu(NamedTuple):
    """What bounds a GPU."""

    arch: str
    multiprocessors: int
    ghz: float
    terabytes_per_second: float  # read and written


GPUS = {
    "A100 SXM 80 GB, data sheet": Gpu("80", 108, 1.41, 2.04),
    "H200, copies as measured": Gpu("90", 132, 1.98, 4.3),
    "B200, data sheet, clock assumed": Gpu("100", 148, 1.9, 8.0),
}
BITS = 10.62  # of a compressed weight
# Read off the listing: what a warp does once per chunk, per weight. Of that, what is integer.
OUTSIDE, OUTSIDE_INTEGER = 2.0, 1.5
# A multiprocessor's lanes that start an instruction in each clock.
ISSUE_LANES, INTEGER_LANES = 128, 64
# Cycles that a warp's access to shared memory takes, by tools/count_conflicts.py. Four weights of
# each lane take two look-ups and a refill.
LOOKUP_CYCLES, REFILL_CYCLES = 3.6, 1.7


class Resources(NamedTuple):
    """What ptxas says that a kernel takes."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int

    def blocks(self, arch: str) -> int:
        """How many blocks a multiprocessor holds at once."""
        threads, blocks, shared = MULTIPROCESSOR[arch]
        # Registers are handed out to warps, eight at a time for each thread.
        per_thread = -(-self.registers // 8) * 8
        return min(
            blocks,
            threads // THREADS,
            REGISTERS // (per_thread * THREADS),
            shared // (self.shared_bytes + 1024),
        )


def resources(arch: str) -> Resources:
    """What the decoder takes."""
    with tempfile.TemporaryDirectory() as name:
        source = pathlib.Path(name) / "kernel.cu"
        source.write_text(SOURCE)
        command = [find_tool("nvcc"), "-std=c++17", f"-I{ROOT / 'xla_ffi'}", f"-arch=sm_{arch}"]
        command += ["-cubin", "-Xptxas", "-v", "-o", source.with_suffix(".cubin"), source]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern):
        return int(re.search(pattern, log)[1])

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    stack, shared = number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem")
    return Resources(number(r"Used (\d+) registers"), shared, stack, spilled)


def limits(gpu: Gpu, instructions: float, integer: float) -> dict[str, float]:
    """Weights per second, in units of 10^12, that each part of a GPU could take.

    Args:
        gpu: which.
        instructions: per weight, in the inner loop.
        integer: those of them that keep the integer unit busy.
    """
    clocks = gpu.multiprocessors * gpu.ghz / 1e3
    return {
        "memory": gpu.terabytes_per_second * 8 / (16 + BITS),
        "issue": ISSUE_LANES * clocks / (instructions + OUTSIDE),
        "integer": INTEGER_LANES * clocks / (integer + OUTSIDE_INTEGER),
        "shared memory": 4 * 32 * clocks / (2 * LOOKUP_CYCLES + REFILL_CYCLES),
    }


def main() -> None:
    """Prints the tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for tool in ("nvcc", "nvdisasm"):
        if not find_tool(tool):
            raise SystemExit(f"{tool} is neither on PATH nor installed with pip")
    print(
        "| architecture | registers | shared memory | stack, spills | blocks, warps | occupancy |"
    )
    print("|---|---|---|---|---|---|")
    for arch in ARCHITECTURES:
        took = resources(arch)
        blocks = took.blocks(arch)
        warps = blocks * THREADS // 32
        print(
            f"| sm_{arch} | {took.registers} | {took.shared_bytes:,} "
            f"| {took.stack_bytes}, {took.spilled_bytes} | {blocks}, {warps} "
            f"| {100 * blocks * THREADS / MULTIPROCESSOR[arch][0]:.0f} % |"
        )
    print()
    parts = ("memory", "issue", "integer", "shared memory")
    print("| T weights/s |", " | ".join(parts), "| TB/s of bf16, at most |")
    print("|---|---|---|---|---|---|")
    for name, gpu in GPUS.items():
        instructions, weights, units = count(gpu.arch)
        found = limits(gpu, instructions / weights, units["integer"] / weights)
        least = min(found.values())
        cells = (f"**{v:.2f}**" if v == least else f"{v:.2f}" for v in found.values())
        print(f"| {name} |", " | ".join(cells), f"| {2 * least:.2f} |")


if __name__ == "__main__":
    main()
