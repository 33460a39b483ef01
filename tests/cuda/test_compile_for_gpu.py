"""What XLA makes of compressed blocks on a GPU; compiles for one, needs none."""

import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_for_gpu.py")


@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason='needs XLA\'s compiler for CUDA: pip install "jax[cuda13]"',
)
@pytest.mark.skipif(
    not importlib.util.find_spec("df11_jax._native_cuda"),
    reason="needs the CUDA decoder: install df11_jax with nvcc on PATH",
)
def test_memory_and_copies():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    programs = [json.loads(line) for line in result.stdout.splitlines()]
    compressed = [p for p in programs if p["weights"] == "compressed"]
    assert [p["program"] for p in compressed] == ["scan", "token_loop"]
    for program in compressed:
        print(program)
        assert program["temporary_blocks"] < 1.15
        assert program["decode_calls"] == 1
        # Payloads are handed over whole: what moves is the layer index and the activations.
        for shape in program["copied_or_sliced"]:
            dims = [int(d) for d in re.findall(r"\d+", shape.partition("[")[2])]
            assert math.prod(dims) <= 4 * 1024, shape
