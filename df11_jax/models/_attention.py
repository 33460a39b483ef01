"""Attention of queries to the key-value cache, a part of it at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from df11_jax.models import _cache
from df11_jax.models._cache import Inputs, Slots
from df11_jax.models._config import Config

# Bytes of attention scores at a time, and of keys and values that XLA copies out of the cache: for
# many or long sequences, all of them at once would take most of the memory.
PART_BYTES = 64 * 2**20


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"] | None,
    value: Float[Array, "batch seq kv_heads head_dim"] | None,
    slots: Slots,
    layer: Int[Array, ""],
    inputs: Inputs,
    config: Config,
) -> tuple[Float[Array, "batch seq heads head_dim"], Slots]:
    """Means of the values, weighted by how well their keys fit the queries.

    Args:
        query: the queries of some tokens.
        key: the keys of the same tokens; None to attend as the last layer with keys did.
        value: the values of the same tokens.
        slots: the slots of all layers of this type, without these tokens.
        layer: the index of the layer among those of its type.
        inputs: the inputs of the layers of this type.
        config: the configuration of the transformer.

    Returns:
        The means, and the slots with keys and values of the tokens.
    """
    if key is None or value is None:
        return _attend(query, None, None, *_last(slots), inputs, config), slots
    key, value = _cache.to_bits(key), _cache.to_bits(value)

    if inputs.origins is None:
        slots = _cache.write(slots, key, value, layer, inputs)
        return _attend(query, None, None, slots, layer, inputs, config), slots
    # Attention comes first: the last of these tokens take slots that the first still attend to.
    if slots.recent is None:
        mixed = _attend(query, key, value, slots, layer, inputs, config)
    else:
        recent = tuple(
            jnp.concatenate([jax.lax.dynamic_slice_in_dim(stack, layer, 1), new[None]], axis=3)
            for stack, new in ((slots.keys, key), (slots.values, value))
        )
        slots = slots._replace(recent=recent)
        mixed = _attend(query, None, None, *_last(slots), inputs, config)
    # This adds 0, since no number is larger than infinity, but XLA does not know that: so the write
    # depends on the read. Otherwise XLA would copy all slots, to be able to write them first. (On a
    # CPU, optimization_barrier does not prevent that.)
    layer = layer + (mixed[0, 0, 0, 0] > jnp.inf)
    return mixed, _cache.write(slots, key, value, layer, inputs)


def _last(slots: Slots) -> tuple[Slots, Int[Array, ""]]:
    """The slots that the last layer with keys attended to, and its index in them."""
    if slots.recent is None:
        return slots, jnp.int32(slots.keys.shape[0] - 1)
    keys, values = slots.recent
    return slots._replace(keys=keys, values=values), jnp.int32(0)


def _attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: UInt[Array, "batch kv_heads seq head_dim"] | None,
    value: UInt[Array, "batch kv_heads seq head_dim"] | None,
    slots: Slots,
    layer: Int[Array, ""],
    inputs: Inputs,
    config: Config,
) -> Float[Array, "batch seq heads head_dim"]:
    c = config
    batch, seq = inputs.positions.shape
    keys = inputs.key_positions.shape[1]
    # Consecutive query heads share a key-value head: give them an axis of their own.
    query = jnp.moveaxis(query.reshape(batch, seq, c.kv_heads, -1, c.head_dim), 1, 2)

    def attend_part(query: Array, row: Array, head: Array) -> Array:
        rows, heads, _, shared, _ = query.shape
        part = (layer, row, head, (rows, heads), c.dtype)
        part_keys = _cache.read(slots.keys, key, *part)
        part_values = _cache.read(slots.values, value, *part)
        positions, key_positions = (
            jax.lax.dynamic_slice_in_dim(places, row, rows)
            for places in (inputs.positions, inputs.key_positions)
        )

        def attend_tokens(query: Array, _row: Array, _head: Array, token: Array) -> Array:
            tokens = query.shape[2]
            # Not mapped over the tokens: for a single sequence, XLA for GPUs would then keep the
            # keys of all layers a second time, transposed.
            flat = query.reshape(rows * heads, tokens * shared, c.head_dim)
            scores = jnp.einsum("nqd,ntd->nqt", flat, part_keys, preferred_element_type=jnp.float32)
            scores = softcap(scores * c.attention_scale, c.attention_softcap)
            places = jax.lax.dynamic_slice_in_dim(positions, token, tokens, axis=1)
            ago = places[..., None] - key_positions[:, None]
            visible = ago >= 0
            if inputs.window is not None:
                visible &= ago < inputs.window
            scores = scores.reshape(rows, heads, tokens, shared, keys)
            scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores).astype(c.dtype)
            weights = weights.reshape(rows * heads, tokens * shared, keys)
            return jnp.einsum("nqt,ntd->nqd", weights, part_values).reshape(query.shape)

        a_token = 4 * rows * heads * shared * keys
        return _in_parts(attend_tokens, query, (rows, heads, PART_BYTES // a_token))

    a_head = 2 * keys * c.head_dim * slots.keys.dtype.itemsize
    a_row = a_head * c.kv_heads
    mixed = _in_parts(attend_part, query, (PART_BYTES // a_row, PART_BYTES // a_head))
    return jnp.moveaxis(mixed, 2, 1).reshape(batch, seq, -1, c.head_dim)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`cap * tanh(x / cap)`, or `x` if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _in_parts(
    function: Callable[..., Array],
    array: Array,
    most: tuple[int, ...],
    starts: tuple[Array, ...] = (),
) -> Array:
    """The result of applying a function to an array, part by part.

    Args:
        function: the function of a part, and of its start along each axis of `most`; the result has
            the shape and dtype of the part, and does not depend on how the array is divided.
        array: the array to divide.
        most: the greatest length of a part along each of the first axes; less than 1 counts as 1.
        starts: the starts along the axes that are divided already.
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
        # All parts are equally long: the last one overlaps the one before, and the elements that
        # they have in common come out the same.
        start = jnp.minimum(i * length, size - length)
        part = jax.lax.dynamic_slice_in_dim(array, start, length, axis)
        new = _in_parts(function, part, most, (*starts, start))
        return jax.lax.dynamic_update_slice_in_dim(out, new, start, axis)

    return jax.lax.fori_loop(0, parts, do_part, jnp.zeros_like(array))
