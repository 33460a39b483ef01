"""Counts the SASS instructions per weight of the CUDA decoders' inner loops.

    python tools/count_sass.py

The native layout: it compiles xla_ffi/native/cuda/decode_kernel.cuh and disassembles it. Loops are
found by their back edges: a branch to a label before it. Of the loops that have no loop in them and
store to global memory 16 bytes at a time, the inner loop is the one that loads most from shared
memory: from the look-up table and from the staged record (the kernel's other such loops read raw
chunks, or records that are not staged). All instructions from the label to the branch count,
predicated ones too. A lane stores 8 weights with one 16-byte store, so instructions / (8 * stores)
is the number of instructions per weight.

What a warp does once per chunk (find it, stage it, sum up the checksum) is outside the loop and
not counted.

The decoder for groups of chunks, xla_ffi/native/cuda/decode_bulk.cuh, from sm_90 on: the loop that
stores boxes by tensor maps. A lane decodes 32 weights of each chunk in it. All of it counts, waits
and copies included, but not what is branched over unless a step has patches (it holds a vote).

The product, xla_ffi/native/cuda/product_kernel.cuh: the loop that multiplies on tensor cores, two
steps an iteration, of which a lane decodes 64 weights. All of it counts but patches.

The published layout: three loops of xla_ffi/published/cuda/decode_kernel.cuh. One counts codes, one
decodes them, one joins them with signs and mantissas. The first two make two look-ups in shared
memory and load the next word of the stream; if a code is too long for the table they branch to
something that loads bytes from global memory, which is not counted. How many codes two look-ups
find depends on the weights: it is computed for normal ones.

Needs nvcc and nvdisasm, from PATH or from pip (nvidia-cuda-nvcc, nvidia-cuda-nvdisasm).
"""

import argparse
import collections
import functools
import glob
import heapq
import math
import os
import pathlib
import random
import re
import shutil
import site
import subprocess
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100")
BULK_ARCHITECTURES = ("90", "100", "120")

BULK_CHUNKS = {1: "single chunks", 2: "pairs of chunks"}
SOURCE = '#include "native/cuda/decode_kernel.cuh"'
PUBLISHED_SOURCE = '#include "published/cuda/decode_kernel.cuh"'


def bulk_source(chunks: int, warps: int = 8) -> str:
    """The decoder for groups of this many chunks, with blocks of this many warps."""
    return f"""
#include "native/cuda/decode_bulk.cuh"
template __global__ void df11::native::bulk_decode_kernel<{warps}, {chunks}>(
    const __grid_constant__ df11::native::BulkBatch);
"""


# With up to 8, 16 and 32 rows of x.
PRODUCT_SOURCE = """#include "native/cuda/product_kernel.cuh"
namespace df11::native {
#if __CUDA_ARCH__ >= 900
using Copies = BulkCopies<false>;
using CopiesWithX = BulkCopies<true>;
#else
using Copies = LaneCopies;
using CopiesWithX = LaneCopies;
#endif
template __global__ void product_kernel<1, Copies>(const __grid_constant__ ProductWork);
template __global__ void product_kernel<2, CopiesWithX>(const __grid_constant__ ProductWork);
template __global__ void product_kernel<4, CopiesWithX>(const __grid_constant__ ProductWork);
}"""
PRODUCT_ROWS = {1: 8, 2: 16, 4: 32}  # by tiles of 8 rows
PRODUCT_ARCHITECTURES = ("80", "90", "100", "120")
# Of a look-up there: kIndexBits and kMaxCodes in xla_ffi/published/cuda/step_table.cuh.
INDEX_BITS, MAX_CODES = 11, 4

# Which unit an instruction keeps busy; what is not listed is "other".
UNITS = {
    "integer": "LOP3 PLOP3 SHF IADD3 VIADD LEA PRMT SEL ISETP MOV",
    "IMAD": "IMAD",
    "shared": "LDS STS",
    "global": "LDG STG",
    "tensor": "HMMA",
}


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool: from PATH, beside nvcc, or from a pip package."""
    if found := shutil.which(name):
        return found
    folders = [os.path.join(p, "nvidia", "*", "bin") for p in site.getsitepackages()]
    if nvcc := shutil.which("nvcc"):
        folders.insert(0, os.path.dirname(os.path.realpath(nvcc)))
    for folder in folders:
        for path in glob.glob(os.path.join(folder, name)):
            if os.access(path, os.X_OK):
                return path
    return None


@functools.cache
def disassemble(source_text: str, arch: str) -> dict[str, list[str]]:
    """The lines of each kernel, labels and instructions."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = (pathlib.Path(folder, name) for name in ("kernels.cu", "kernels.cubin"))
        source.write_text(source_text)
        include = f"-I{ROOT / 'xla_ffi'}"
        command = [find_tool("nvcc"), "-std=c++17", include, f"-arch=sm_{arch}", "-cubin"]
        subprocess.run([*command, "-o", cubin, source], check=True)
        text = subprocess.run(
            [find_tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True
        ).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.MULTILINE)
    return {
        name: body.splitlines() for name, body in zip(sections[1::2], sections[2::2], strict=True)
    }


class Kernel:
    """A kernel's instructions without predicates, and its loops."""

    def __init__(self, lines: list[str]) -> None:
        self.instructions: list[str] = []
        self.branches: dict[int, str] = {}  # by instruction: the label that it may go to
        self.labels: dict[str, int] = {}
        for line in lines:
            if match := re.match(r"(\.L_\w+):", line.strip()):
                self.labels[match[1]] = len(self.instructions)
            elif match := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([^;]*);", line.strip()):
                if branch := re.match(r"BRA.*\((\.L_\w+)\)", match[1]):
                    self.branches[len(self.instructions)] = branch[1]
                self.instructions.append(match[1])
        # First and last instruction.
        self.loops = [
            (self.labels[label], at)
            for at, label in self.branches.items()
            if self.labels[label] <= at
        ]

    def innermost_loops(self) -> list[list[str]]:
        """The loops that have no loop in them."""
        return [
            self.instructions[begin : end + 1]
            for begin, end in self.loops
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in self.loops)
        ]

    def loop_of_boxes(self) -> list[str]:
        """The innermost loop that stores by tensor maps, without what only patches need."""
        loops = [
            (begin, end)
            for begin, end in self.loops
            if any(i.startswith("UTMASTG") for i in self.instructions[begin : end + 1])
        ]
        begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
        path, at = [], begin
        while at <= end:
            path.append(self.instructions[at])
            target = self.labels[self.branches[at]] if at in self.branches else 0
            skipped = self.instructions[at + 1 : target] if target <= end else []
            rare = any(i.startswith(("VOTE", "STS.U16")) for i in skipped)
            at = target if rare else at + 1
        return path

    def usual_paths(self, rarities: Sequence[str] = (r"LDG.*\.U8",)) -> list[list[str]]:
        """The loops, without what is branched over and has an instruction that matches."""
        paths = []
        for begin, end in self.loops:
            path, at = [], begin
            while at <= end:
                path.append(self.instructions[at])
                target = self.labels[self.branches[at]] if at in self.branches else 0
                skipped = self.instructions[at + 1 : target] if target <= end else []
                rare = any(re.match(rarity, i) for i in skipped for rarity in rarities)
                rare = rare and not any(i.startswith("HMMA") for i in skipped)
                at = target if rare else at + 1
            paths.append(path)
        return paths


def opcode(instruction: str) -> str:
    """The instruction's name without its modifiers."""
    return instruction.split()[0].split(".")[0]


def stores(loop: list[str]) -> int:
    """How often a loop stores 16 bytes to global memory."""
    return sum(i.startswith("STG") and ".128" in i for i in loop)


def copies_wait(loop: list[str], expected_loads: int) -> bool:
    """Whether copies depend on what so many loads have from where they go: see after_loads."""
    copies = [at for at, i in enumerate(loop) if opcode(i) in ("UBLKCP", "LDGSTS")]
    loads = {at for at, i in enumerate(loop) if i.startswith("LDS.128") and at < max(copies)}
    waits = all(loads <= computed_from(loop, at) for at in copies)
    return len(loads) == expected_loads and bool(copies) and waits


def computed_from(path: list[str], at: int) -> set[int]:
    """The instructions before this one on a path that its operands depend on."""
    needed, found = registers(path[at], 2), set()
    for i in reversed(range(at)):
        target, _, sources = path[i].partition(",")
        if "[" in target:
            continue  # a store
        written = registers(target, 4 if ".128" in target else 2 if "WIDE" in target else 1)
        if written & needed:
            needed = (needed - written) | registers(sources, 2)
            found.add(i)
    return found


def registers(text: str, count: int) -> set[str]:
    """Those that are named, and those after them that operands of `count` registers take, too."""
    named = re.findall(r"\b(U?R)(\d+)\b", text)
    return {f"{kind}{int(number) + i}" for kind, number in named for i in range(count)}


def units(loop: list[str]) -> collections.Counter:
    """How many instructions keep each unit busy."""
    unit_of = {code: unit for unit, codes in UNITS.items() for code in codes.split()}
    return collections.Counter(unit_of.get(opcode(i), "other") for i in loop)


def inner_loop(lines: list[str]) -> tuple[list[str], int]:
    """The inner loop of a staged chunk, and the weights that a lane decodes in it."""

    def lookups(loop):
        return sum(opcode(i) == "LDS" for i in loop)

    loops = Kernel(lines).innermost_loops()
    loop = max(loops, key=lambda loop: lookups(loop) if stores(loop) else 0)
    return loop, 8 * stores(loop)


def count(arch: str) -> tuple[int, int, collections.Counter]:
    """(instructions, weights, instructions by unit) of the native layout's inner loop."""
    (lines,) = disassemble(SOURCE, arch).values()
    loop, weights = inner_loop(lines)
    return len(loop), weights, units(loop)


def bulk_loop(arch: str, chunks: int) -> list[str]:
    """The inner loop of the decoder for groups of chunks."""
    (lines,) = disassemble(bulk_source(chunks), arch).values()
    return Kernel(lines).loop_of_boxes()


def count_bulk(arch: str, chunks: int) -> tuple[int, int, collections.Counter]:
    """As `count`, of the decoder for groups of chunks."""
    loop = bulk_loop(arch, chunks)
    return len(loop), 32 * chunks, units(loop)


@functools.cache
def codes_per_lookup() -> float:
    """How many codes a look-up finds in the published layout, of normal weights."""
    rng = random.Random(0)
    exponents = [math.frexp(rng.gauss(0, 0.02))[1] for _ in range(200_000)]
    nodes = [(count, e, [e]) for e, count in collections.Counter(exponents).items()]
    heapq.heapify(nodes)
    lengths = collections.Counter()
    while len(nodes) > 1:
        (few, _, a), (more, tie, b) = heapq.heappop(nodes), heapq.heappop(nodes)
        lengths.update(a + b)
        heapq.heappush(nodes, (few + more, tie, a + b))
    lookups = found = bits = 0
    for exponent in exponents:
        if found == MAX_CODES or bits + lengths[exponent] > INDEX_BITS:
            lookups += 1
            found = bits = 0
        found += 1
        bits += lengths[exponent]
    return len(exponents) / lookups


def count_published(arch: str) -> list[tuple[str, int, float, collections.Counter]]:
    """(loop, instructions, weights of a lane, instructions by unit) of the published layout's."""
    (lines,) = disassemble(PUBLISHED_SOURCE, arch).values()
    kernel = Kernel(lines)

    def shortest(loads: int, stores: int) -> list[str]:
        def matches(path):
            codes = collections.Counter(map(opcode, path))
            return codes["LDS"] == loads and codes["STS"] == stores and codes["LDG"] == 0

        return min(filter(matches, kernel.usual_paths()), key=len)

    join = max(kernel.innermost_loops(), key=stores)
    # Two look-ups, of one word or of two, and the next word of the stream.
    loops = {"count": shortest(3, 0), "decode": shortest(5, 2), "join": join}
    found = 2 * codes_per_lookup()
    return [
        (name, len(loop), 8 * stores(loop) if loop is join else found, units(loop))
        for name, loop in loops.items()
    ]


def product_loops(arch: str) -> dict[int, list[str]]:
    """The product's inner loops of two steps, by the rows of x that they are for.

    Without patches: they are branched over, and put into weights by a permutation that is computed.
    """
    loops = {}
    for name, lines in disassemble(PRODUCT_SOURCE, arch).items():
        tiles = int(re.search(r"ILi(\d)E", name)[1])
        paths = [
            path
            for path in Kernel(lines).usual_paths((r"PRMT R\d+, R\S+, R\d\S*, R\d",))
            # 36 look-ups and loads for two steps; records in shared memory have refills there, too.
            # More are of x, where it is copied.
            if sum(opcode(i) == "HMMA" for i in path) == 8 * tiles
            and sum(opcode(i) == "LDS" for i in path) > 36 + tiles
        ]
        loops[PRODUCT_ROWS[tiles]] = min(paths, key=len)
    return dict(sorted(loops.items()))


def count_product(arch: str) -> list[tuple[int, int, int, collections.Counter]]:
    """(rows of x, instructions, weights of a lane, instructions by unit) of the product's loops."""
    return [(rows, len(loop), 64, units(loop)) for rows, loop in product_loops(arch).items()]


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for tool in ("nvcc", "nvdisasm"):
        if not find_tool(tool):
            raise SystemExit(f"{tool} is neither on PATH nor installed with pip")
    columns = [*UNITS, "other"]
    print("| architecture | instructions per weight | of them", ", ".join(columns), "|")
    print("|---|---|---|")
    for arch in ARCHITECTURES:
        print_row(f"sm_{arch}", *count(arch))
    for arch in BULK_ARCHITECTURES:
        for chunks, name in BULK_CHUNKS.items():
            print_row(f"sm_{arch}, {name}", *count_bulk(arch, chunks))
    print(f"\nPublished layout, {codes_per_lookup():.2f} codes a look-up\n")
    print("| architecture | loop | instructions per weight | of them", ", ".join(columns), "|")
    print("|---|---|---|---|")
    for arch in ARCHITECTURES:
        for loop, instructions, weights, by_unit in count_published(arch):
            print_row(f"sm_{arch} | {loop}", instructions, weights, by_unit)

    print()
    print("| product | rows of x | instructions per weight | of them", ", ".join(columns), "|")
    print("|---|---|---|---|")
    for arch in PRODUCT_ARCHITECTURES:
        for rows, instructions, weights, by_unit in count_product(arch):
            print_row(f"sm_{arch} | {rows}", instructions, weights, by_unit)


def print_row(what: str, instructions: int, weights: float, by_unit: collections.Counter) -> None:
    """Prints a row of the table."""
    shares = ", ".join(f"{by_unit[unit] / weights:.2f}" for unit in (*UNITS, "other"))
    per_weight = f"{instructions} / {weights:.4g} = **{instructions / weights:.2f}**"
    print(f"| {what} | {per_weight} | {shares} |")


if __name__ == "__main__":
    main()
