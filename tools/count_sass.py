"""Counts the SASS instructions per weight of the CUDA decoder's inner loop.

    python tools/count_sass.py

It compiles xla_ffi/cuda/decode_kernel.cuh, with and without the checksum, and disassembles it.
Loops are found by their back edges: a branch to a label before it. Of the loops that have no
loop in them and store to global memory 16 bytes at a time, the inner loop is the one that loads
most from shared memory: from the look-up table and from the staged record (the kernel's other
such loops read raw chunks, or records that are not staged). All instructions from the label to
the branch count, predicated ones too. A lane stores 8 weights with one 16-byte store, so
instructions / (8 * stores) is the number of instructions per weight.

What a warp does once per chunk (find it, stage it, sum up the checksum) is outside the loop and
not counted.

Needs nvcc and nvdisasm, from PATH or from pip (nvidia-cuda-nvcc, nvidia-cuda-nvdisasm).
"""

import argparse
import collections
import glob
import os
import pathlib
import re
import shutil
import site
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100")

SOURCE = """
#include "cuda/decode_kernel.cuh"
template __global__ void df11::decode_kernel<true>(const __grid_constant__ df11::DecodeBatch);
template __global__ void df11::decode_kernel<false>(const __grid_constant__ df11::DecodeBatch);
"""

# Which unit an instruction keeps busy; what is not listed is "other".
UNITS = {
    "integer": "LOP3 PLOP3 SHF IADD3 VIADD LEA PRMT SEL ISETP MOV",
    "IMAD": "IMAD",
    "shared": "LDS STS",
    "global": "LDG STG",
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


def disassemble(arch: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """The lines of each kernel, labels and instructions."""
    source, cubin = folder / "kernels.cu", folder / f"sm_{arch}.cubin"
    source.write_text(SOURCE)
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


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """The loops that have no loop in them, as lists of instructions without predicates."""
    instructions, labels, loops = [], {}, []
    for line in lines:
        if match := re.match(r"(\.L_\w+):", line.strip()):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([^;]*);", line.strip()):
            instructions.append(match[1])
            branch = re.match(r"BRA.*\((\.L_\w+)\)", match[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    return [
        instructions[begin:end]
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]


def opcode(instruction: str) -> str:
    """The instruction's name without its modifiers."""
    return instruction.split()[0].split(".")[0]


def inner_loop(lines: list[str]) -> tuple[list[str], int]:
    """The inner loop of a staged chunk, and the weights that a lane decodes in it."""

    def stores(loop):
        return sum(i.startswith("STG") and ".128" in i for i in loop)

    def lookups(loop):
        return sum(opcode(i) == "LDS" for i in loop)

    loop = max(innermost_loops(lines), key=lambda loop: lookups(loop) if stores(loop) else 0)
    return loop, 8 * stores(loop)


def count(arch: str) -> list[tuple[bool, int, int, collections.Counter]]:
    """(with checksum, instructions, weights, instructions by unit) of both kernels."""
    unit_of = {code: unit for unit, codes in UNITS.items() for code in codes.split()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, lines in disassemble(arch, pathlib.Path(folder)).items():
            loop, weights = inner_loop(lines)
            units = collections.Counter(unit_of.get(opcode(i), "other") for i in loop)
            rows.append(("Lb1E" in name, len(loop), weights, units))
    return sorted(rows, reverse=True)


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for tool in ("nvcc", "nvdisasm"):
        if not find_tool(tool):
            raise SystemExit(f"{tool} is neither on PATH nor installed with pip")
    columns = [*UNITS, "other"]
    print("| architecture | checksum | instructions per weight | of them", ", ".join(columns), "|")
    print("|---|---|---|---|")
    for arch in ARCHITECTURES:
        for checksum, instructions, weights, units in count(arch):
            shares = ", ".join(f"{units[unit] / weights:.2f}" for unit in columns)
            per_weight = f"{instructions} / {weights} = **{instructions / weights:.2f}**"
            print(f"| sm_{arch} | {'yes' if checksum else 'no'} | {per_weight} | {shares} |")


if __name__ == "__main__":
    main()
