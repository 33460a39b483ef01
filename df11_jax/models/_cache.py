"""The key-value cache: a slot for each token, or in sliding layers for each that is still seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt
from numpy.typing import DTypeLike

from df11_jax.models import _rope
from df11_jax.models._config import Config
from df11_jax.models._kinds import Kind

# The position of empty slots, and of tokens that fill up rows: after all others.
NOWHERE = np.iinfo(np.int32).max


class Slots(NamedTuple):
    """Keys (already rotated) and values of all layers of a kind, and which tokens they are of.

    Keys and values are kept as bit patterns: to change a part of a bfloat16 array, XLA on a CPU
    writes all of it anew.
    """

    keys: UInt[Array, "layers batch kv_heads slots head_dim"]
    values: UInt[Array, "layers batch kv_heads slots head_dim"]
    positions: Int[Array, "batch slots"]


class Cache(NamedTuple):
    """What attention looks at.

    Tokens take slots one after the other, those of all rows of a batch at the same time. Rows may
    begin later than others, so each slot has its position in each row.

    Attributes:
        full: of layers that attend to all positions before; a slot for each token. None without
            such layers.
        sliding: of layers that attend to the last `window` positions; no more slots than that. A
            token takes the slot of the one that is out of sight with it. None without such layers.
    """

    full: Slots | None
    sliding: Slots | None

    def of(self, kind: Kind) -> Slots:
        """The slots of layers of a kind that there are."""
        slots = self.full if kind == "full" else self.sliding
        assert slots is not None
        return slots

    def replace(self, kind: Kind, slots: Slots) -> "Cache":
        """The same with other slots of layers of a kind."""
        return Cache(slots, self.sliding) if kind == "full" else Cache(self.full, slots)


class Inputs(NamedTuple):
    """What blocks of one kind get beside activations.

    Attributes:
        window: how many positions they look back, themselves included; None for all.
        positions: of the tokens.
        key_positions: of all keys, those of the tokens included.
        slots: the first of those that tokens are written to: at one place, or at two.
        origins: for each slot which of the tokens goes there, negative for none. None if tokens go
            to one place, and are in their slots before anything is looked at.
        rotation: of the tokens.
    """

    window: int | None
    positions: Int[Array, "batch seq"]
    key_positions: Int[Array, "batch keys"]
    slots: Int[Array, " begins"]
    origins: Int[Array, " slots"] | None
    rotation: _rope.Rotation


def init_cache(config: Config, batch: int, slots: int) -> Cache:
    """An empty cache.

    Args:
        config: of the decoder.
        batch: how many sequences.
        slots: for how many tokens of each.
    """
    sliding = sum(config.sliding)
    full = config.layers - sliding
    return Cache(
        init_slots(config, full, batch, slots) if full else None,
        init_slots(config, sliding, batch, min(slots, config.window)) if sliding else None,
    )


def init_slots(config: Config, layers: int, batch: int, slots: int) -> Slots:
    """Empty slots of layers of one kind."""
    shape = (layers, batch, config.kv_heads, slots, config.head_dim)
    bits = _bits(config.dtype)
    return Slots(
        jnp.zeros(shape, bits),
        jnp.zeros(shape, bits),
        jnp.full((batch, slots), NOWHERE, jnp.int32),
    )


def place(
    slots: Slots,
    positions: Int[Array, "batch seq"],
    slot: Int[Array, ""],
    keep: Int[Array, ""] | int,
    kind: Kind,
    config: Config,
) -> tuple[Slots, Inputs]:
    """Gives tokens their slots in all layers of a kind, which keys and values do not fill yet.

    Args:
        slots: of the layers.
        positions: of the tokens.
        slot: of the first token, counted from the beginning of the sequences.
        keep: how many of the tokens to keep in sliding layers.
        kind: of the layers.
        config: of the decoder.

    Returns:
        The slots with the positions of the tokens, and what blocks need to know.
    """
    seq, size = positions.shape[1], slots.positions.shape[1]
    window, rope = None, config.rope
    if kind == "sliding":
        window, rope = config.window, config.local_rope
    rotation = _rope.rotation(positions, rope, config.head_dim)
    if window is None or seq == 1:
        slot = slot if window is None else slot % size
        places = jax.lax.dynamic_update_slice_in_dim(slots.positions, positions, slot, axis=1)
        inputs = Inputs(window, positions, places, slot[None], None, rotation)
        return slots._replace(positions=places), inputs
    # Seen from the slot of the last token that is kept, others are of tokens before it.
    last = slot + keep - 1
    origins = keep - 1 - (last - jnp.arange(size)) % size
    count = min(seq, size)
    # They may go on at the beginning.
    oldest = (last + 1 - count) % size
    first = jnp.minimum(oldest, size - count)
    begins = first[None] if count == size else jnp.stack([first, jnp.zeros_like(first)])
    keys = jnp.concatenate([slots.positions, positions], axis=1)
    inputs = Inputs(window, positions, keys, begins, origins, rotation)
    return slots._replace(positions=_pick(positions, slots.positions, origins, axis=1)), inputs


def to_bits(
    new: Float[Array, "batch seq kv_heads head_dim"],
) -> UInt[Array, "batch kv_heads seq head_dim"]:
    """Keys or values of some tokens, as slots have them."""
    return jax.lax.bitcast_convert_type(jnp.moveaxis(new, 1, 2), _bits(new.dtype))


def write(
    slots: Slots,
    key: UInt[Array, "batch kv_heads seq head_dim"],
    value: UInt[Array, "batch kv_heads seq head_dim"],
    layer: Int[Array, ""],
    inputs: Inputs,
) -> Slots:
    """Puts keys and values of some tokens into their slots."""

    def update(i: Array | int, slots: Slots) -> Slots:
        place = layer, inputs.slots[i], inputs.origins
        return slots._replace(
            keys=_write_to(slots.keys, key, *place), values=_write_to(slots.values, value, *place)
        )

    if len(inputs.slots) == 1:
        return update(0, slots)
    # In a loop, since XLA for CPUs would fuse the second with the first, and copy all slots.
    return jax.lax.fori_loop(0, len(inputs.slots), update, slots)


def read(
    stack: UInt[Array, "layers batch kv_heads slots head_dim"],
    new: UInt[Array, "batch kv_heads seq head_dim"] | None,
    layer: Int[Array, ""],
    row: Int[Array, ""],
    head: Int[Array, ""],
    counts: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "pairs keys head_dim"]:
    """Keys or values of some rows and heads: those in slots, then new ones, if there are any."""
    start = _starts(layer, row, head, 0, 0)
    bits = jax.lax.dynamic_slice(stack, start, (1, *counts, *stack.shape[3:]))[0]
    if new is not None:
        part = jax.lax.dynamic_slice(new, start[1:], (*counts, *new.shape[2:]))
        bits = jnp.concatenate([bits, part], axis=2)
    return jax.lax.bitcast_convert_type(bits.reshape(-1, *bits.shape[2:]), dtype)


def _write_to(
    stack: UInt[Array, "layers batch kv_heads slots head_dim"],
    new: UInt[Array, "batch kv_heads seq head_dim"],
    layer: Int[Array, ""],
    slot: Int[Array, ""],
    origins: Int[Array, " slots"] | None,
) -> UInt[Array, "layers batch kv_heads slots head_dim"]:
    """Writes to slots from one on: as many as there are tokens, but no more than there are."""
    start = _starts(layer, 0, 0, slot, 0)
    if origins is not None:
        count = min(new.shape[2], stack.shape[3])
        shape = (1, *stack.shape[1:3], count, stack.shape[4])
        old = jax.lax.dynamic_slice(stack, start, shape)[0]
        origins = jax.lax.dynamic_slice_in_dim(origins, slot, count)
        new = _pick(new, old, origins, axis=2)
    return jax.lax.dynamic_update_slice(stack, new[None], start)


def _starts(*starts: Int[Array, ""] | int) -> tuple[Int[Array, ""], ...]:
    """Of one dtype, as slicing wants them, whether numbers have 32 bits or 64 by default."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)


def _pick(new: Array, old: Array, origins: Int[Array, " n"], axis: int) -> Array:
    """Along an axis, those of `new` that `origins` says, and of `old` where it is negative."""
    shape = [1] * old.ndim
    shape[axis] = len(origins)
    picked = jnp.take(new, jnp.maximum(origins, 0), axis=axis, mode="clip")
    return jnp.where(origins.reshape(shape) >= 0, picked, old)


def _bits(dtype: DTypeLike) -> np.dtype:
    """The unsigned integers that are as large."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")
