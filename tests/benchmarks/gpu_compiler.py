"""For tests that compile programs for a GPU, and need none."""

import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

needs_gpu_compiler = [
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda13_plugin"),
        reason='needs XLA\'s compiler for CUDA: pip install "jax[cuda13]"',
    ),
    pytest.mark.skipif(
        not importlib.util.find_spec("df11_jax._cuda_library"),
        reason="needs the CUDA decoder: install df11_jax with nvcc on PATH",
    ),
]


def run_script(name: str, *options: str) -> list[dict[str, Any]]:
    """The lines of JSON that a script of `benchmarks/` prints."""
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / name
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return list(map(json.loads, result.stdout.splitlines()))
