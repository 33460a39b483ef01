"""The gated delta rule: chunks compute what one token after the other does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from df11_jax.models import _delta_rule
from df11_jax.models._config import DeltaRule
from df11_jax.models._delta_rule import Steps

RULE = DeltaRule((True, False, True), key_heads=2, value_heads=4, key_dim=8, value_dim=6, taps=4)
BATCH, LAYER = 2, 1


def draw(seq, seed=0):
    """Queries, keys, values, decays and rates of some tokens, and states before them."""
    rng = np.random.default_rng(seed)
    shapes = ((2, 8), (2, 8), (4, 6), (4,), (4,))
    q, k, v, g, beta = (rng.standard_normal((BATCH, seq, *shape)) for shape in shapes)
    k[:, 1::2] = k[:, :1]  # keys that are the same make the system that is solved a hard one
    states = _delta_rule.init_states(RULE, BATCH, np.float32)
    matrices = rng.standard_normal(states.matrices.shape)
    parts = q, k, v, -np.exp(g - 3), 1 / (1 + np.exp(-4 * beta))
    return [jnp.asarray(x, jnp.float32) for x in parts], states._replace(
        matrices=jnp.asarray(matrices, jnp.float32)
    )


def one_by_one(parts, matrices, counts):
    """The outputs and the last states in float64, by the definition."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in parts)
    q, k = (x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (np.repeat(x, 2, axis=2) for x in (q / np.sqrt(8), k))
    states, out = np.asarray(matrices, np.float64).copy(), np.zeros(v.shape)
    for i in range(q.shape[1]):
        left = states * np.exp(g[:, i])[..., None, None]
        known = np.einsum("bhvk,bhk->bhv", left, k[:, i])
        new = (v[:, i] - known) * beta[:, i, :, None]
        new = left + np.einsum("bhv,bhk->bhvk", new, k[:, i])
        states = np.where(counts[:, i, None, None, None], new, states)
        out[:, i] = np.einsum("bhvk,bhk->bhv", states, q[:, i])
    return out, states


@pytest.mark.parametrize("seq", [1, 2, 7, 8, 9, 17])
def test_chunks_are_one_token_after_the_other(seq, monkeypatch):
    monkeypatch.setattr(_delta_rule, "CHUNK", 8)
    parts, states = draw(seq)
    exist = np.arange(seq) >= np.array([[0], [seq // 2]])  # of the second row, half is padding
    rule = jax.jit(functools.partial(_delta_rule.apply_rule, layer=jnp.int32(LAYER)))
    for keep in sorted({1, seq // 2 + 1, seq}):
        counts = exist & (np.arange(seq) < keep)
        expected, last = one_by_one(parts, states.matrices[LAYER], counts)
        out, after = rule(*parts, states=states, steps=Steps(exist, jnp.int32(keep)))
        np.testing.assert_allclose(after.matrices[LAYER], last, atol=1e-5)
        np.testing.assert_array_equal(after.matrices[0], states.matrices[0])
        np.testing.assert_allclose(out[counts], expected[counts], atol=1e-5)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_convolutions_go_on_after_the_tokens_that_are_kept(keep):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, 5, RULE.channels)), jnp.float32)
    taps = jnp.asarray(rng.standard_normal((RULE.taps, 1, RULE.channels)), jnp.float32)
    states = _delta_rule.init_states(RULE, BATCH, np.float32)
    exist = np.array([[True] * 5, [False] + [True] * 4])  # one row begins with padding

    def convolve(first, states, keep):
        steps = Steps(exist[:, first:], jnp.int32(keep))
        return _delta_rule.convolve(x[:, first:], taps, states, jnp.int32(LAYER), steps)

    whole, _ = convolve(0, states, 5)
    padded = np.pad(np.where(exist[..., None], x, 0), ((0, 0), (RULE.taps - 1, 0), (0, 0)))
    sums = sum(padded[:, i : i + 5] * taps[i] for i in range(RULE.taps))
    np.testing.assert_allclose(whole, jax.nn.silu(sums), atol=1e-6)
    _, states = convolve(0, states, keep)
    if keep < 5:
        rest, _ = convolve(keep, states, 5 - keep)
        np.testing.assert_array_equal(rest, whole[:, keep:])
    last = np.asarray(states.inputs[LAYER]).view(np.float32)
    np.testing.assert_array_equal(last, padded[:, keep : keep + RULE.taps - 1])
    assert not states.inputs[0].any()
