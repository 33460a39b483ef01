"""Takes out of the decoder for pairs of chunks what orders its accesses, one thing at a time."""

import re
import shutil
import subprocess

import pytest
from compiling import ROOT, needs_compiler
from test_kernel_emulated import ARGUMENTS

pytestmark = pytest.mark.slow

SOURCE = "native/cuda/chunk_pair.cuh"
ORDERS = re.compile(r"^\s*(wait_\w+(<\d>)?|fence_\w+|__syncwarp)\(.*\);")


def places() -> list[int]:
    lines = (ROOT / "xla_ffi" / SOURCE).read_text().splitlines()
    return [i for i, line in enumerate(lines) if ORDERS.match(line)]


@needs_compiler
@pytest.mark.parametrize("place", [None, *places()])
def test_nothing_may_be_left_out(place, tmp_path):
    shutil.copytree(ROOT / "xla_ffi", tmp_path / "xla_ffi")
    changed = tmp_path / "xla_ffi" / SOURCE
    lines = changed.read_text().splitlines()
    if place is not None:
        print(lines.pop(place).strip())
    changed.write_text("\n".join(lines))
    program = tmp_path / "driver"
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-DDF11_DECODE_WARPS=2", *ARGUMENTS]
    command += [f"-I{tmp_path / 'xla_ffi'}", "tests/xla_ffi/native/kernel_test.cc"]
    command += ["-x", "c++", tmp_path / "xla_ffi/native/cuda/decode.cu", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([program, "0", "pairs"], capture_output=True, text=True, timeout=3600)
    print(result.stdout[-300:], result.stderr[:300])
    assert (result.returncode == 0) == (place is None)
