"""What XLA makes of compressed blocks on a GPU; compiles for one, needs none."""

import math
import re

import pytest
from gpu_compiler import needs_gpu_compiler, run_script

from df11_jax.bench.blocks import BLOCKS

pytestmark = needs_gpu_compiler


@pytest.fixture(scope="module")
def programs():
    return {program["program"]: program for program in run_script("compile_for_gpu.py")}


@pytest.mark.parametrize("name", ["scan", "token_loop", "llama_8b", "llama_8b_decoding"])
def test_memory_and_copies(programs, name):
    program = programs.get(name) or programs[f"{name}_compressed"]
    assert program["temporary_blocks"] < 1.15
    assert program["decode_calls"] == 1
    # Payloads are handed over whole: what moves is the activations and the loop's counter.
    for shape in program["copied_or_sliced"]:
        dims = [int(d) for d in re.findall(r"\d+", shape.partition("[")[2])]
        assert math.prod(dims) <= 4 * 4096, shape


def test_step_of_a_scan(programs):
    # The decoder, the loop's counter, and what the block does: nothing to fetch the layer's index.
    step = programs["llama_8b_decoding"]["step"]
    assert step == ["kCustomCall", "kCustomKernel", "kCustomKernel"]


@pytest.mark.parametrize("name", ["scan_compressed", "token_loop_compressed", "llama_8b"])
def test_decoder_is_in_a_cuda_graph(programs, name):
    assert programs[name]["in_graph"]


def test_small_tensors_are_one_call(programs):
    assert programs["small_tensors"]["decode_calls"] == 1
    assert programs["small_tensors"]["in_graph"]


@pytest.mark.parametrize("way", ["x @ W", "x @ E.T"])
@pytest.mark.parametrize("name", ["qkv", "gate_up"])
def test_plain_products_of_the_benchmark_are_cublas_alone(programs, name, way):
    """As many calls as there are, none merged with another, and no weights copied."""
    program = programs[f"{name} {way}"]
    assert program["cublas_calls"] == 4
    assert not program["copied_or_sliced"]
    assert program["temporary_blocks"] * _bytes_of(name) < 2**26  # cuBLAS's own


def test_products_of_the_benchmark_are_fused_where_rows_are_few(programs):
    program = programs["qkv compressed"]
    assert program["fused"]
    assert program["product_calls"] == 4
    assert program["cublas_calls"] == program["decode_calls"] == 0
    assert program["in_graph"]
    assert program["temporary_blocks"] < 0.1


def test_other_products_of_the_benchmark_are_decoded_one_at_a_time(programs):
    program = programs["gate_up compressed"]
    assert not program["fused"]
    assert program["decode_calls"] == 4
    assert program["cublas_calls"] == 2 * 4
    assert program["in_graph"]
    assert program["temporary_blocks"] * _bytes_of("gate_up") < _bytes_of("gate_up") + 2**26


def _bytes_of(name):
    return 2 * sum(k * n for k, n in BLOCKS["Llama-3.1-8B"].products[name].values())
