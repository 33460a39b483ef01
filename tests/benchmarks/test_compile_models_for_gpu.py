"""What generation takes on a GPU, and that XLA computes it alike; compiles for one, needs none."""

import pytest
from gpu_compiler import needs_gpu_compiler, run_script
from known_configs import KNOWN

from df11_jax import models

pytestmark = needs_gpu_compiler

MIXTURE = "Qwen3-30B-A3B"
# Runs of layers of one type: those of a pattern, and what is left at the end.
RUNS = {"gemma-3-4b": 3, "gemma-3-27b": 3, "gemma-4-31B": 2, "Qwen3.5-27B": 2}


@pytest.fixture(scope="module")
def ways():
    """What came of each way, for each model, batch and prompt."""
    programs = run_script("compile_models_for_gpu.py")
    return {
        way: [program for program in programs if program["way"] == way]
        for way in ("exact", "plain", "fused")
    }


@pytest.fixture(scope="module")
def pairs(ways):
    """For each model, batch and prompt, what came of compressed and of plain weights."""
    return list(zip(ways["exact"], ways["plain"], strict=True))


def test_memory_is_weights_and_cache_and_one_block_and_a_piece_of_the_head(pairs):
    for program, _ in pairs:
        held = program["weights"] + program["cache"]
        bound = 1.05 * (held + program["block"] + program["piece"])
        assert held + program["decode"] <= bound
        assert held + program["prefill"] <= bound


def test_token_loop_does_not_copy_the_cache(pairs):
    long = [program for program, _ in pairs if program["batch"] == 1 and program["prompt"] > 30_000]
    assert {program["model"] for program in long} == {"Llama-3.1-8B", "gemma-3-27b"}
    for program in long:
        assert program["decode"] <= program["block"] + program["piece"]


def test_no_program_copies_caches(pairs):
    for pair in pairs:
        for program in pair:
            assert program["cache_copies"] == [[], []]


def test_estimate_is_the_plan_or_little_more(pairs):
    for program, _ in pairs:
        plan = program["weights"] + program["cache"] + max(program["prefill"], program["decode"])
        assert plan <= program["estimate"] <= 1.04 * plan


def test_fused_token_loop_has_no_block_that_is_decompressed(ways):
    for program in ways["fused"]:
        # Decays and rates of linear layers have too few outputs for a fused product.
        small = ["bf16[5120,48]"] if program["model"] == "Qwen3.5-27B" else []
        assert program["fused"] and program["dense"] == small
        # For q, k and v; o; gate and up; down. Of a mixture, the last two for each expert of a
        # token; of several tokens, experts are decompressed. And the head, and the embedding.
        decodes, products = 1 + len(small), 4 * RUNS.get(program["model"], 1) + 1
        if program["model"] == MIXTURE:
            decodes, products = (1, 2 + 2 * 8 + 1) if program["batch"] == 1 else (2, 3)
        assert program["calls"] == ["df11_decode"] * decodes + ["df11_product"] * products
        assert program["decode"] < program["block"]
    assert not any(program["fused"] for program in ways["exact"] + ways["plain"])
    assert all(program["dense"] for program in ways["exact"] if program["devices"] == 1)


def test_decoder_is_called_for_embedding_and_block_and_head(pairs):
    for compressed, plain in pairs:
        runs, experts = RUNS.get(compressed["model"], 1), compressed["model"] == MIXTURE
        assert compressed["calls"] == ["df11_decode"] * (2 + runs + experts)
        assert plain["calls"] == []


def test_devices_exchange_activations_and_no_weights(pairs):
    for pair in pairs:
        for program in pair:
            if program["devices"] == 1:
                assert program["moved"] == []
            else:
                # Sums after attention and MLP, embeddings, and logits; what goes from stage to
                # stage, and what comes out of the last.
                dim = models.read_config(KNOWN[program["model"]]).dim
                vocab = -(-128_256 // (64 * program["devices"])) * 64 * program["devices"]
                batch = program["batch"]
                logits = f"{batch},{vocab}" if batch > 1 else str(vocab)
                sums = [f"f32[{batch},1,{dim}]", f"u32[{batch},1,{dim}]"]
                passed = [f"bf16[{batch},1,{dim}]"] if program["stages"] > 1 else []
                assert program["moved"] == sorted([f"f32[{logits}]", *sums, *passed])


def test_stages_keep_sums_of_blocks_within_hosts(pairs):
    sent = {
        (program["devices"], program["stages"]): program["sent"]
        for pair in pairs
        for program in pair
        if program["model"] == "Llama-3.1-405B"
    }
    # Two sums for each of 126 blocks, in float32, and much less besides.
    sums = 2 * 126 * 4 * 16_384
    assert 2 * 7 / 8 * sums < sent[8, 1] < 2 * sums
    assert sent[8, 2] < sums / 10


def test_matrix_products_are_the_same_as_with_plain_weights(pairs):
    for compressed, plain in pairs:
        assert compressed["products"] == plain["products"]
