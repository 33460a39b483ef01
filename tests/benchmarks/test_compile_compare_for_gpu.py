"""What `df11-jax compare` would take on a GPU, by XLA's plan; compiles for one, needs none."""

import json

import pytest
from gpu_compiler import needs_gpu_compiler, run_script

SIZES = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
}

pytestmark = needs_gpu_compiler


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """For each way its plan."""
    file = tmp_path_factory.mktemp("compare") / "config.json"
    file.write_text(json.dumps(SIZES))
    options = ["--batch", "1", "--prompt-length", "32000"]
    return {line["way"]: line for line in run_script("compile_compare_for_gpu.py", file, *options)}


def test_offloaded_layers_stay_in_host_memory(plans):
    offloaded = plans["offloaded"]
    assert offloaded["host_layers"] > 0
    assert offloaded["host_arguments"] == offloaded["host_weights"]
    assert offloaded["device_weights"] <= plans["compressed"]["device_weights"]
    assert plans["plain"]["host_arguments"] == plans["compressed"]["host_arguments"] == 0


def test_offloaded_layers_are_copied_one_by_one_while_others_compute(plans):
    """What has a start and an end is done by the GPU beside its kernels."""
    copies = plans["offloaded"]["copies"]
    assert len(copies) >= 7  # all matrices
    for source, target in copies:
        assert source.startswith(f"bf16[{plans['offloaded']['host_layers']},")
        assert target.startswith("bf16[1,")
    assert plans["plain"]["copies"] == plans["compressed"]["copies"] == []


def test_no_way_holds_more_than_a_block_and_no_second_cache(plans):
    for plan in plans.values():
        assert plan["decode_temporary"] < 1.2 * plan["block"] + plan["cache"] / 4
