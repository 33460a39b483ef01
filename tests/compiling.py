"""Compiles C++ tests with the host compiler, and runs them; what tests need to be there."""

import pathlib
import shutil
import subprocess
from collections.abc import Sequence

import pytest
from count_sass import find_tool

ROOT = pathlib.Path(__file__).resolve().parents[1]

FLAGS = {
    "plain": ["-O2"],
    # Without two checks of accesses at which AddressSanitizer stops itself.
    "address,undefined": [
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size",
        "-fno-sanitize-recover",
    ],
    "thread": ["-O1", "-fsanitize=thread"],
}
SANITIZERS = [name for name in FLAGS if name != "plain"]

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ on PATH")

needs_nvcc = pytest.mark.skipif(
    not find_tool("nvcc"), reason="nvcc is neither on PATH nor installed with pip"
)
needs_nvdisasm = pytest.mark.skipif(
    not find_tool("nvdisasm"),
    reason="nvdisasm is neither on PATH nor installed with pip",
)


def run_under(
    sanitizer: str, folder: pathlib.Path, arguments: Sequence[str], standard: str = "c++17"
) -> None:
    """Compiles a program as `build_under` does, runs it, and shows what it prints."""
    result = run_program(build_under(sanitizer, folder, arguments, standard))
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def build_under(
    sanitizer: str, folder: pathlib.Path, arguments: Sequence[str], standard: str = "c++17"
) -> pathlib.Path:
    """Compiles in the project's root with `FLAGS[sanitizer]`.

    Args:
        sanitizer: a key of `FLAGS`.
        folder: for the program.
        arguments: of g++, sources included.
        standard: the C++ standard.
    """
    program = folder / "driver"
    command = [
        "g++",
        f"-std={standard}",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-g1",  # what reports name; all of -g takes half as long again
        "-pthread",
        "-Ixla_ffi",
    ]
    command += [*FLAGS[sanitizer], *arguments, "-o", str(program)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def run_program(program: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs what was compiled."""
    command = [str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if "unexpected memory mapping" in result.stderr:
        # ThreadSanitizer, and a kernel that randomizes addresses more than it expects.
        command = ["setarch", "--addr-no-randomize", *command]
        result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    return result


def ptxas_report(source: str, architectures: Sequence[str], folder: pathlib.Path) -> str:
    """Compiles a file of `xla_ffi/` with nvcc; returns what ptxas says about its kernels.

    For each kernel and architecture: its name, then its stack frame, then the rest.
    """
    command = [find_tool("nvcc"), "-std=c++17", "-Werror", "all-warnings", "-fatbin"]
    command += ["-Xptxas", "-v", "--threads", "2", f"-I{ROOT / 'xla_ffi'}"]
    for arch in architectures:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-o", folder / "kernels.fatbin", ROOT / "xla_ffi" / source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr
