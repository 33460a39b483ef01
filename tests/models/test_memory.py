"""Memory on the device: the compressed weights, one block, a piece of the head, and the cache."""

import jax
import pytest
import shapes

from df11_jax import models
from df11_jax.models import _programs

SIZES = {
    "vocab_size": 40_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 10),
    reason="is about the CPU backend, which used to make float32 copies of all operands",
)


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_holds_one_block_and_a_piece_of_the_head(family):
    config = models.read_config({**SIZES, "model_type": family})
    params = shapes.param_shapes(config, compress=True)
    piece = shapes.piece_nbytes(params)
    assert piece < 2 * config.vocab * config.dim
    # Of products with a single row, the CPU backend makes float32 copies even now.
    programs = models.compile_programs(params, config, batch=2, prompt=10, tokens=500)
    memory = models.measure_memory(params, programs)
    bound = memory.weights + shapes.block_nbytes(config) + piece + memory.cache
    assert memory.peak <= 1.05 * bound


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize(
    ("family", "batch"),
    [("gemma3_text", 7), ("qwen3_5_text", 1)],
)
def test_caches_are_not_copied(family, batch, monkeypatch):
    sizes = SIZES | {"num_hidden_layers": 14, "sliding_window": 128, "vocab_size": 70}
    config = models.read_config(sizes | {"model_type": family})
    params = shapes.param_shapes(config, compress=True)
    # Pieces of 70 tokens and of 10, both shorter than the window, and of 300.
    for tokens in (70, 300):
        monkeypatch.setattr(_programs, "PIECE_TOKENS", tokens)
        jax.clear_caches()  # of the pieces before
        programs = models.compile_programs(params, config, batch=batch, prompt=600, tokens=100)
        assert shapes.cache_copies(programs.prefill) == []
        assert shapes.cache_copies(programs.decode) == []
