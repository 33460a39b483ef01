"""Sliding layers: they keep no more than they see, and compute what they would with all of it."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import all_logits, assert_same_bits

from df11_jax import models
from df11_jax.bench import placements
from df11_jax.models import _cache, _programs
from df11_jax.models.prompts import pad_prompts

WINDOW = 8
GEMMA = families.CONFIGS["gemma3_text"]
F, S = "full_attention", "sliding_attention"
ORDERS = {
    "pattern": [S, S, S, F] * 3 + [S, S],
    "irregular": [F, S, S, F, F, S],
    "all sliding": [S, S, S],
}
# Many times the window, no longer than it, and in between.
PROMPTS = [list(range(70)), [42], list(range(100, 108)), list(range(200, 251))]
TOKENS = 3 * WINDOW


@functools.cache
def load(order, compress=True):
    """Parameters and configuration of a tiny model whose layers come in an order."""
    types = ORDERS[order]
    config = models.read_config(GEMMA | {"num_hidden_layers": len(types), "layer_types": types})
    assert config.window == WINDOW
    config = dataclasses.replace(config, dtype=jnp.float32)
    return models.load_params(models.RandomSource(config), config, compress=compress), config


def generate(params, config):
    """The tokens of each row, prompts included, and the logits that the last ones are of."""
    length = max(map(len, PROMPTS))
    prompts = pad_prompts(PROMPTS, length)
    lengths = np.array([len(row) for row in PROMPTS], np.int32)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    sampling, none = models.Sampling(temperature=3.0).checked(), np.array([], np.int32)
    room = TOKENS - 1
    state = models.prefill(params, prompts, lengths, sampling, keys, none, length + room, config)
    first = np.asarray(state.tokens)[:, None]
    state, rest = models.decode(params, state, room, sampling, keys, none, room, config)
    tokens = np.concatenate([first, rest], axis=1).tolist()
    return [a + b for a, b in zip(PROMPTS, tokens, strict=True)], state


def with_pieces(config, piece, monkeypatch):
    """Has prompts read in pieces of so many tokens of each row, by programs of their own."""
    monkeypatch.setattr(_programs, "PIECE_TOKENS", piece * len(PROMPTS))
    return dataclasses.replace(config, max_length=200 + piece)


# Tokens of a row that are read at once: fewer than the window has, more, and one. The tests
# below that read as many have the programs compiled already.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "piece"),
    [
        ("pattern", 7),
        ("pattern", 1),
        ("irregular", 5),
        ("all sliding", 9),
    ],
)
def test_generation_is_that_of_one_pass_over_everything(order, piece, monkeypatch):
    params, config = load(order)
    rows, state = generate(params, with_pieces(config, piece, monkeypatch))
    assert len({tuple(row[-TOKENS:]) for row in rows}) == len(rows)
    expected = [logits[-2] for logits in all_logits(params, config, rows)]
    np.testing.assert_allclose(state.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_same_bits_as_with_plain_weights(monkeypatch):
    compressed, plain = (
        generate(params, with_pieces(config, 7, monkeypatch))[1]
        for params, config in (load("pattern"), load("pattern", compress=False))
    )
    assert_same_bits(compressed, plain)


@pytest.mark.slow
def test_whether_numbers_have_64_bits_does_not_matter(monkeypatch):
    params, config = load("irregular")
    config = with_pieces(config, 5, monkeypatch)
    expected, _ = generate(params, config)
    with jax.enable_x64(True):
        assert generate(params, config)[0] == expected


# Of 14 layers in patterns of 4.
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 14])
def test_layers_in_host_memory(count):
    params, config = load("pattern", compress=False)
    weights = placements.PlacedWeights("offloaded", placements.offload(params, count))
    placed = weights.put(jax.devices()[0])
    expected = models.generate(params, PROMPTS, config, tokens=5)
    assert models.generate(placed, PROMPTS, config, tokens=5) == expected


@pytest.mark.parametrize(("slots", "expected"), [(5, 5), (8, 8), (100, 8)])
def test_sliding_layers_have_no_more_slots_than_the_window(slots, expected):
    cache = models.init_cache(load("pattern")[1], 2, slots)
    assert cache.full.keys.shape == (3, 2, 2, slots, 32)
    assert cache.sliding.keys.shape == cache.sliding.values.shape == (11, 2, 2, expected, 32)
    assert cache.sliding.positions.shape == (2, expected)


def test_models_with_layers_of_one_type_have_slots_of_one_type():
    assert models.init_cache(load("all sliding")[1], 1, 100).full is None
    llama = models.read_config(families.CONFIGS["llama"])
    assert models.init_cache(llama, 1, 100).sliding is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
def test_slots_hold_the_last_tokens_that_are_kept(size):
    """Of pieces of any lengths, of which some tokens come again."""
    _, config = load("all sliding")
    config = dataclasses.replace(config, window=size, kv_heads=1, head_dim=2)
    slots = _cache.init_slots(config, 2, 1, size)
    rng, slot, layer = np.random.default_rng(size), 0, jnp.int32(1)
    for seq in (1, size, 3, 2 * size + 1, 1, 1, *rng.integers(1, 2 * size + 2, 8)):
        keep = int(rng.integers(1, seq + 1))
        tokens = slot + jnp.arange(seq)[None]
        new = _cache.to_bits(tokens[..., None, None] + jnp.zeros((1, seq, 1, 2), jnp.float32))
        seen, (slots, inputs) = (
            slots,
            _cache.assign_slots(slots, tokens, jnp.int32(slot), keep, "sliding", config),
        )
        slots = _cache.write(slots, new, new + 1, layer, inputs)
        end = slot + (keep if seq > 1 else 1)
        expected = np.full(size, _cache.NOWHERE)
        kept = np.arange(max(0, end - size), end)
        expected[kept % size] = kept
        np.testing.assert_array_equal(slots.positions[0], expected)
        held = np.where(expected == _cache.NOWHERE, 0, expected).astype(np.float32)
        np.testing.assert_array_equal(slots.keys[1, 0, 0, :, 0].view(np.float32), held)
        written = slots.values[1] - slots.keys[1]
        np.testing.assert_array_equal(written[0, 0, :, 0], expected != _cache.NOWHERE)
        assert not slots.keys[0].any() and not slots.values[0].any()
        if seq > 1:
            np.testing.assert_array_equal(inputs.key_positions[0], [*seen.positions[0], *tokens[0]])
        slot = end
