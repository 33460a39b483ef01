"""Leaves out of the kernels that copy in bulk what orders their accesses, one thing at a time."""

import os
import re
import shutil
import subprocess

import pytest
from compiling import ROOT, needs_compiler
from test_kernel_emulated import ARGUMENTS

pytestmark = pytest.mark.slow

ORDERS = re.compile(r"^\s*((\w+(\.|::))?(wait_\w+(<\d>)?|fence_\w+|give_turn|__sync\w+)\(.*\));")
LEFT_OUT = """#pragma once
#include <cstdlib>
inline const int left_out = std::atoi(std::getenv("LEFT_OUT"));
"""


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "driver", "host", "arguments"),
    [
        (["chunk_group.cuh"], "kernel_test.cc", "decode.cu", ["0", "groups"]),
        (["product_kernel.cuh", "product_copies.cuh"], "product_test.cc", "product.cu", ["5"]),
    ],
)
def test_nothing_may_be_left_out(changed, driver, host, arguments, tmp_path):
    shutil.copytree(ROOT / "xla_ffi", tmp_path / "xla_ffi")
    kernels = tmp_path / "xla_ffi/native/cuda"
    (tmp_path / "xla_ffi/left_out.h").write_text(LEFT_OUT)
    statements = {}
    # One program, which is told what to leave out: by an expression, that may stand anywhere.
    for name in changed:
        lines = (kernels / name).read_text().splitlines()
        for i, line in enumerate(lines):
            if match := ORDERS.match(line):
                place = len(statements)
                statements[place] = f"{name}: {match[1]}"
                lines[i] = f"(left_out == {place} ? void() : {match[1]});"
        lines.insert(lines.index("#pragma once") + 1, '#include "left_out.h"')
        (kernels / name).write_text("\n".join(lines))
    assert len(statements) > 10
    program = tmp_path / "driver"
    command = ["g++", "-std=c++20", "-O1", "-DDF11_DECODE_WARPS=2", "-pthread", *ARGUMENTS]
    command += [f"-I{tmp_path / 'xla_ffi'}", f"tests/xla_ffi/native/{driver}"]
    command += ["-x", "c++", kernels / host, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)

    def fails_without(place):
        environment = os.environ | {"LEFT_OUT": str(place)}
        ended = subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
        print(statements.get(place), ended.stdout[-300:], ended.stderr[:300])
        return ended.returncode != 0

    assert not fails_without(-1)
    assert [statement for i, statement in statements.items() if not fails_without(i)] == []
