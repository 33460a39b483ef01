"""The benchmarks in C++ and CUDA fit the sources that they measure: they are compiled, not run."""

import subprocess

import pytest
from compiling import ROOT, needs_compiler, needs_nvcc
from count_sass import find_tool

CPP = sorted(ROOT.glob("benchmarks/*.cc"))
CUDA = sorted(ROOT.glob("benchmarks/*.cu"))


def compile_source(*command):
    result = subprocess.run(
        [*map(str, command), "-std=c++17", "-I.", "-Ixla_ffi"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@needs_compiler
@pytest.mark.parametrize("source", CPP, ids=lambda path: path.name)
def test_cpp(source):
    compile_source("g++", "-fsyntax-only", source)


@needs_nvcc
@pytest.mark.parametrize("source", CUDA, ids=lambda path: path.name)
def test_cuda(source, tmp_path):
    compile_source(find_tool("nvcc"), "--ptx", "-arch=sm_90", "-o", tmp_path / "ptx", source)
