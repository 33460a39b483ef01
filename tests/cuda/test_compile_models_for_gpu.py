"""What generation takes on a GPU, and that XLA computes it alike; compiles for one, needs none."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_models_for_gpu.py")

pytestmark = [
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda13_plugin"),
        reason='needs XLA\'s compiler for CUDA: pip install "jax[cuda13]"',
    ),
    pytest.mark.skipif(
        not importlib.util.find_spec("df11_jax._native_cuda"),
        reason="needs the CUDA decoder: install df11_jax with nvcc on PATH",
    ),
]


@pytest.fixture(scope="module")
def pairs():
    """For each model, batch and prompt, what came of compressed and of plain weights."""
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    programs = list(map(json.loads, result.stdout.splitlines()))
    compressed, plain = programs[::2], programs[1::2]
    assert all(program["compressed"] for program in compressed)
    assert not any(program["compressed"] for program in plain)
    return list(zip(compressed, plain, strict=True))


def test_memory_is_weights_and_cache_and_one_block_and_a_piece_of_the_head(pairs):
    for program, _ in pairs:
        held = program["weights"] + program["cache"]
        bound = 1.05 * (held + program["block"] + program["piece"])
        assert held + program["decode"] <= bound
        assert held + program["prefill"] <= bound


def test_token_loop_does_not_copy_the_cache(pairs):
    long = [program for program, _ in pairs if program["batch"] == 1 and program["prompt"] > 30_000]
    assert long
    for program in long:
        assert program["decode"] <= program["block"] + program["piece"]


def test_estimate_is_the_plan_or_little_more(pairs):
    for program, _ in pairs:
        plan = program["weights"] + program["cache"] + max(program["prefill"], program["decode"])
        assert plan <= program["estimate"] <= 1.04 * plan


def test_decoder_is_called_for_embedding_and_block_and_head(pairs):
    for compressed, plain in pairs:
        assert compressed["calls"] == ["df11_decode"] * 3
        assert plain["calls"] == []


def test_matrix_products_are_the_same_as_with_plain_weights(pairs):
    for compressed, plain in pairs:
        assert compressed["products"] == plain["products"]
