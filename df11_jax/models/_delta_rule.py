"""The gated delta rule of linear layers: states, a convolution, and the rule, chunk by chunk.

Each value head has a state S, a matrix that maps keys to values. A token with query q, key k,
value v, decay exp(g) and rate beta makes it

    S' = exp(g) S + beta (v - exp(g) S k) k^T

and its output is S' q. A chunk of tokens is computed at once: what its tokens add to the state
solves a triangular system (https://arxiv.org/abs/2412.06464).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt
from numpy.typing import DTypeLike

from df11_jax.models._bit_patterns import bits_dtype, to_bits
from df11_jax.models._config import DeltaRule

# Tokens that are computed at once. More need more products, fewer more steps.
CHUNK = 64
# The rule is computed in float32. By default, GPUs and TPUs would round its operands.
_PRECISION = jax.lax.Precision.HIGHEST


class States(NamedTuple):
    """The states of all linear layers, in place of keys and values.

    Attributes:
        inputs: the last inputs of the convolution, as bit patterns, for the reason that keys are;
            channels of queries, keys and values of a key head are neighbours.
        matrices: the matrices of the rule. GPUs sum along their last axis, for each token: with
            another one there, XLA would transpose the states of all layers.
    """

    inputs: UInt[Array, "layers batch taps_before channels"]
    matrices: Float[Array, "layers batch value_heads value_dim key_dim"]


class Steps(NamedTuple):
    """Which of some tokens change the states.

    Attributes:
        exist: tokens that do not only pad a row.
        keep: the number of tokens, from the first on, after which the states are kept.
    """

    exist: Bool[Array, "batch seq"]
    keep: Int[Array, ""]


def init_states(rule: DeltaRule, batch: int, dtype: DTypeLike) -> States:
    """The states before the first token, of which some inputs have this dtype."""
    layers = sum(rule.layers)
    matrix = rule.value_dim, rule.key_dim
    return States(
        jnp.zeros((layers, batch, rule.taps - 1, rule.channels), bits_dtype(dtype)),
        jnp.zeros((layers, batch, rule.value_heads, *matrix), jnp.float32),
    )


def convolve(
    x: Float[Array, "batch seq channels"],
    taps: Float[Array, "taps 1 channels"],
    states: States,
    layer: Int[Array, ""],
    steps: Steps,
) -> tuple[Float[Array, "batch seq channels"], States]:
    """A causal convolution of each channel by itself, and its activation.

    Returns:
        The activations, and the states with the last inputs that are kept.
    """
    seq, count = x.shape[1], len(taps)
    x = jnp.where(steps.exist[..., None], x, 0)
    before = jax.lax.bitcast_convert_type(_take(states.inputs, layer), x.dtype)
    x = jnp.concatenate([before, x], axis=1)
    parts = (
        x[:, i : i + seq].astype(jnp.float32) * taps[i].astype(jnp.float32) for i in range(count)
    )
    last = jax.lax.dynamic_slice_in_dim(x, steps.keep, count - 1, axis=1)
    states = states._replace(inputs=_put(states.inputs, to_bits(last), layer))
    return jax.nn.silu(sum(parts)).astype(x.dtype), states


def apply_rule(
    query: Float[Array, "batch seq key_heads key_dim"],
    key: Float[Array, "batch seq key_heads key_dim"],
    value: Float[Array, "batch seq value_heads value_dim"],
    decay: Float[Array, "batch seq value_heads"],
    rate: Float[Array, "batch seq value_heads"],
    states: States,
    layer: Int[Array, ""],
    steps: Steps,
) -> tuple[Float[Array, "batch seq value_heads value_dim"], States]:
    """The outputs of some tokens, and the states after those that are kept.

    Args:
        query: the queries, of any length.
        key: the keys, of any length.
        value: the values.
        decay: the logarithms by which the states decay, at most 0.
        rate: the rates, from 0 to 1.
        states: the states of all linear layers before these tokens.
        layer: the index of the layer among them.
        steps: the tokens that count; the outputs of others have no meaning.
    """
    seq = value.shape[1]
    kept = steps.exist & (jnp.arange(seq) < steps.keep)
    decay, rate = (jnp.where(kept[..., None], x, 0) for x in (decay, rate))
    compute = _read_token if seq == 1 else _read_chunks
    matrices, out = compute(_take(states.matrices, layer), query, key, value, decay, rate)
    return out, states._replace(matrices=_put(states.matrices, matrices, layer))


def _read_token(
    matrices: Array, query: Array, key: Array, value: Array, decay: Array, rate: Array
) -> tuple[Array, Array]:
    """The states after a single token, and its outputs.

    The states are read by one sum only, on which those that take their place depend. Otherwise XLA
    would copy the states of all layers.
    """
    query, key, value = (x[:, 0].astype(jnp.float32) for x in (query, key, value))
    query, key = _prepare(query, key, value.shape[1])
    left = matrices * jnp.exp(decay[:, 0])[..., None, None]
    both = jnp.stack([key, query], axis=2)
    read = jnp.sum(left[:, :, None] * both[..., None, :], axis=-1)
    new = (value - read[:, :, 0]) * rate[:, 0, :, None]
    out = read[:, :, 1] + jnp.sum(key * query, axis=-1, keepdims=True) * new
    return left + new[..., None] * key[..., None, :], out[:, None]


def _read_chunks(matrices: Array, *parts: Array) -> tuple[Array, Array]:
    """The states after some tokens, and their outputs, computed chunk by chunk."""
    seq = parts[0].shape[1]
    size = min(seq, CHUNK)
    chunks = -(-seq // size)

    def split(x: Array) -> Array:
        """[chunks, batch, heads, size, ...], filled up with zeros, which change no state."""
        x = jnp.pad(x, [(0, 0), (0, chunks * size - seq)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], chunks, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    def step(matrices: Array, chunk: list[Array]) -> tuple[Array, Array]:
        query, key, *rest = (x.astype(jnp.float32) for x in chunk)
        return _read_chunk(matrices, *_prepare(query, key, rest[0].shape[1]), *rest)

    matrices, out = jax.lax.scan(step, matrices, [split(x) for x in parts])
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1)
    return matrices, out.reshape(out.shape[0], chunks * size, *out.shape[3:])[:, :seq]


def _prepare(query: Array, key: Array, heads: int) -> tuple[Array, Array]:
    """Queries and keys of length 1, the former scaled, for each of the value heads."""
    query, key = (
        jnp.repeat(
            x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6),
            heads // x.shape[1],
            axis=1,
        )
        for x in (query, key)
    )
    return query * query.shape[-1] ** -0.5, key


def _read_chunk(
    matrices: Float[Array, "batch heads value_dim key_dim"],
    query: Float[Array, "batch heads size key_dim"],
    key: Float[Array, "batch heads size key_dim"],
    value: Float[Array, "batch heads size value_dim"],
    decay: Float[Array, "batch heads size"],
    rate: Float[Array, "batch heads size"],
) -> tuple[
    Float[Array, "batch heads value_dim key_dim"], Float[Array, "batch heads size value_dim"]
]:
    """The states after a chunk, and its outputs."""
    total = jnp.cumsum(decay, axis=-1)
    since = jnp.where(
        jnp.tri(query.shape[2], dtype=bool), total[..., None] - total[..., None, :], -jnp.inf
    )
    between = jnp.exp(since)  # what is left of the state after one token when another comes
    begin, end = jnp.exp(total)[..., None], jnp.exp(total[..., -1:] - total)[..., None]
    # What the tokens would write to an empty state, and how they read the one that is there.
    written = jnp.concatenate([value, key * begin], axis=-1) * rate[..., None]
    system = _dot(key, key, "bhik,bhjk->bhij") * between * rate[..., None]
    written = jax.lax.linalg.triangular_solve(
        system, written, left_side=True, lower=True, unit_diagonal=True
    )
    written, reads = jnp.split(written, [value.shape[-1]], axis=-1)
    read = _dot(jnp.concatenate([reads, query * begin], axis=2), matrices, "bhik,bhvk->bhiv")
    known, out = jnp.split(read, 2, axis=2)
    new = written - known
    out += _dot(_dot(query, key, "bhik,bhjk->bhij") * between, new, "bhij,bhjv->bhiv")
    left = matrices * jnp.exp(total[..., -1])[..., None, None]
    return left + _dot(key * end, new, "bhik,bhiv->bhvk"), out


def _dot(a: Array, b: Array, subscripts: str) -> Array:
    return jnp.einsum(subscripts, a, b, precision=_PRECISION)


def _take(stack: Array, layer: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _put(stack: Array, new: Array, layer: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, new, layer, 0)
