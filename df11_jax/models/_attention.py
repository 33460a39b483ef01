"""Attention: the key-value cache, and what queries make of it, a part at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt
from numpy.typing import DTypeLike

from df11_jax.models import _rope
from df11_jax.models._config import Config

# The position of empty slots, and of tokens that fill up rows: after all others.
NOWHERE = np.iinfo(np.int32).max

# Of attention scores at a time, and of keys and values that XLA copies out of the cache: for many
# or long sequences they would else be most of the memory.
PART_BYTES = 64 * 2**20


class Cache(NamedTuple):
    """What attention looks at: keys (already rotated) and values of all layers.

    They are in slots, which are filled from the first to the last, those of all rows of a batch at
    the same time. Rows may leave slots out, so each slot has its position.

    Sliding layers have as many slots as the others, which they could do without.

    Keys and values are kept as bit patterns: to change a part of a bfloat16 array, XLA on a CPU
    writes all of it anew.
    """

    keys: UInt[Array, "layers batch kv_heads slots head_dim"]
    values: UInt[Array, "layers batch kv_heads slots head_dim"]
    positions: Int[Array, "batch slots"]


class Inputs(NamedTuple):
    """What blocks get beside activations, the same for all.

    Attributes:
        slot: of the first token.
        positions: of the tokens.
        slot_positions: of all slots, those of the tokens included.
        rotations: for full and for sliding layers.
    """

    slot: Int[Array, ""]
    positions: Int[Array, "batch seq"]
    slot_positions: Int[Array, "batch slots"]
    rotations: _rope.Rotation


class Layer(NamedTuple):
    """Which block it is.

    Attributes:
        number: counted from 0.
        sliding: whether it attends to the last `window` positions only.
    """

    number: Int[Array, ""]
    sliding: Bool[Array, ""]


def init_cache(config: Config, batch: int, slots: int) -> Cache:
    """An empty cache.

    Args:
        config: of the decoder.
        batch: how many sequences.
        slots: for how many tokens of each.
    """
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    bits = _bits(config.dtype)
    return Cache(
        jnp.zeros(shape, bits),
        jnp.zeros(shape, bits),
        jnp.full((batch, slots), NOWHERE, jnp.int32),
    )


def write(
    stack: UInt[Array, "layers batch kv_heads slots head_dim"],
    new: Float[Array, "batch seq kv_heads head_dim"],
    layer: Layer,
    slot: Int[Array, ""],
) -> UInt[Array, "layers batch kv_heads slots head_dim"]:
    """Puts keys or values of some tokens into their slots."""
    bits = jax.lax.bitcast_convert_type(jnp.moveaxis(new, 1, 2), stack.dtype)
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(stack, bits[None], (layer.number, zero, zero, slot, zero))


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    cache: Cache,
    inputs: Inputs,
    layer: Layer,
    config: Config,
) -> Float[Array, "batch seq heads head_dim"]:
    """Means of the values, weighted by how well their keys fit the queries."""
    c = config
    batch, seq = inputs.positions.shape
    slots = cache.positions.shape[1]
    # Consecutive query heads share a key-value head: give them an axis of their own.
    query = jnp.moveaxis(query.reshape(batch, seq, c.kv_heads, -1, c.head_dim), 1, 2)

    def attend_part(query: Array, row: Array, head: Array) -> Array:
        rows, heads, _, shared, _ = query.shape
        keys = _read(cache.keys, layer, row, head, (rows, heads), c.dtype)
        values = _read(cache.values, layer, row, head, (rows, heads), c.dtype)
        positions, slot_positions = (
            jax.lax.dynamic_slice_in_dim(places, row, rows)
            for places in (inputs.positions, inputs.slot_positions)
        )

        def attend_tokens(query: Array, _row: Array, _head: Array, token: Array) -> Array:
            tokens = query.shape[2]
            # Not mapped over the tokens: of one sequence, XLA for GPUs would then keep the keys of
            # all layers a second time, transposed.
            flat = query.reshape(rows * heads, tokens * shared, c.head_dim)
            scores = jnp.einsum("nqd,ntd->nqt", flat, keys, preferred_element_type=jnp.float32)
            scores = softcap(scores * c.attention_scale, c.attention_softcap)
            places = jax.lax.dynamic_slice_in_dim(positions, token, tokens, axis=1)
            ago = places[..., None] - slot_positions[:, None]
            visible = ago >= 0
            if any(c.sliding):
                visible &= ~layer.sliding | (ago < c.window)
            scores = scores.reshape(rows, heads, tokens, shared, slots)
            scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores).astype(c.dtype)
            weights = weights.reshape(rows * heads, tokens * shared, slots)
            return jnp.einsum("nqt,ntd->nqd", weights, values).reshape(query.shape)

        a_token = 4 * rows * heads * shared * slots
        return _in_parts(attend_tokens, query, (rows, heads, PART_BYTES // a_token))

    a_head = 2 * slots * c.head_dim * cache.keys.dtype.itemsize
    a_row = a_head * c.kv_heads
    mixed = _in_parts(attend_part, query, (PART_BYTES // a_row, PART_BYTES // a_head))
    return jnp.moveaxis(mixed, 2, 1).reshape(batch, seq, -1, c.head_dim)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`cap * tanh(x / cap)`, or `x` if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _read(
    stack: UInt[Array, "layers batch kv_heads slots head_dim"],
    layer: Layer,
    row: Int[Array, ""],
    head: Int[Array, ""],
    counts: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "pairs slots head_dim"]:
    """Keys or values of some rows and heads."""
    start = (layer.number, row, head, jnp.int32(0), jnp.int32(0))
    bits = jax.lax.dynamic_slice(stack, start, (1, *counts, *stack.shape[3:]))
    return jax.lax.bitcast_convert_type(bits.reshape(-1, *stack.shape[3:]), dtype)


def _in_parts(
    function: Callable[..., Array],
    array: Array,
    most: tuple[int, ...],
    starts: tuple[Array, ...] = (),
) -> Array:
    """What a function makes of an array, part by part.

    Args:
        function: gets a part, and along each axis of `most` where it starts; the result has the
            shape and dtype of the part, and does not depend on how the array is divided.
        array: to be divided.
        most: how long parts are along the first axes, at most; less than 1 is taken for 1.
        starts: along the axes that are done with.
    """
    axis = len(starts)
    if axis == len(most):
        return function(array, *starts)
    size = array.shape[axis]
    parts = -(-size // max(1, most[axis]))
    if parts == 1:
        return _in_parts(function, array, most, (*starts, jnp.int32(0)))
    length = -(-size // parts)

    def do_part(i: Array, out: Array) -> Array:
        # All parts are equally long. What two of them have in common comes out the same.
        start = jnp.minimum(i * length, size - length)
        part = jax.lax.dynamic_slice_in_dim(array, start, length, axis)
        new = _in_parts(function, part, most, (*starts, start))
        return jax.lax.dynamic_update_slice_in_dim(out, new, start, axis)

    return jax.lax.fori_loop(0, parts, do_part, jnp.zeros_like(array))


def _bits(dtype: DTypeLike) -> np.dtype:
    """The unsigned integers that are as large."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")
