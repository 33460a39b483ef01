"""The key-value cache, which has a slot for each token.

Sliding layers have slots for the tokens within their window only, linear layers have a state.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from df11_jax.models import _bit_patterns, _delta_rule, _rope
from df11_jax.models._config import Config
from df11_jax.models._delta_rule import States, Steps
from df11_jax.models._layer_types import LayerType, layer_types, type_config

# The position of empty slots, and of tokens that only pad a row: it is after all others.
NOWHERE = np.iinfo(np.int32).max


class Slots(NamedTuple):
    """Keys (already rotated) and values of all layers of a type, and the positions of their tokens.

    Keys and values are kept as bit patterns: to change a part of a bfloat16 array, XLA on a CPU
    writes all of it anew.

    If other layers attend to the keys of the last of these layers, and these do not have slots for
    all tokens, `recent` is what the last layer that was computed attended to: those in its slots,
    and the new ones. It is there within `forward` only.
    """

    keys: UInt[Array, "layers batch kv_heads slots head_dim"]
    values: UInt[Array, "layers batch kv_heads slots head_dim"]
    positions: Int[Array, "batch slots"]
    recent: tuple[UInt[Array, "1 batch kv_heads keys head_dim"], ...] | None = None


class Cache(NamedTuple):
    """The keys and values that attention reads, and the states of linear layers.

    Tokens take slots one after the other, those of all rows of a batch at the same time. Rows may
    begin later than others, so each slot has its position in each row.

    Attributes:
        full: the slots of layers that attend to all positions before, one for each token; None if
            there are no such layers.
        sliding: the slots of layers that attend to the last `window` positions, no more than these;
            a token takes the slot of the token that leaves the window when it comes. None if there
            are no such layers.
        linear: the states of linear layers; None if there are no such layers.
    """

    full: Slots | None
    sliding: Slots | None
    linear: States | None = None

    def of(self, layer_type: LayerType) -> Any:
        """The slots, or states, that the layers of a type read."""
        slots = getattr(self, layer_type.removeprefix("shared_"))
        assert slots is not None
        return slots

    def replace(self, layer_type: LayerType, slots: Any) -> "Cache":
        """A cache with other slots, or states, of the layers of a type."""
        return self._replace(**{layer_type.removeprefix("shared_"): slots})


class Inputs(NamedTuple):
    """The inputs, beside activations, of all blocks of one layer type.

    Attributes:
        window: the number of positions that a token attends to, its own included; None for all.
        positions: the positions of the tokens.
        key_positions: the positions of all keys, those of the tokens included.
        slots: the first slot of each run of slots that tokens are written to; there are one or two.
        origins: the index of the token that goes to each slot, negative for none. None if the
            tokens go to a single run of slots, and are written before attention reads them.
        rotation: the rotation of the tokens.
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
        config: the configuration of the transformer.
        batch: the number of sequences.
        slots: the number of tokens of each sequence that there is room for.
    """
    counts, rule = Counter(layer_types(config)), config.delta_rule

    def init(type_: LayerType, slots: int) -> Slots | None:
        layers = counts[type_]
        return init_slots(type_config(config, type_), layers, batch, slots) if layers else None

    return Cache(
        init("full", slots),
        init("sliding", min(slots, config.window)),
        None if rule is None else _delta_rule.init_states(rule, batch, config.dtype),
    )


def init_slots(config: Config, layers: int, batch: int, slots: int) -> Slots:
    """Empty slots of layers of one type."""
    shape = (layers, batch, config.kv_heads, slots, config.head_dim)
    bits = _bit_patterns.bits_dtype(config.dtype)
    return Slots(
        jnp.zeros(shape, bits),
        jnp.zeros(shape, bits),
        jnp.full((batch, slots), NOWHERE, jnp.int32),
    )


def capacity(cache: Cache, config: Config) -> int:
    """The number of tokens of each sequence that there is room for; `NOWHERE` if any number."""
    slots = cache.full or cache.sliding
    if slots is None:
        return int(NOWHERE)
    count = slots.positions.shape[1]
    # Those of a whole window are written again and again.
    return int(NOWHERE) if cache.full is None and count == config.window else count


def _check_shapes(cache: Cache, batch: int, config: Config) -> None:
    """Checks the shapes of a cache, since slicing would clamp the indices that it does not have.

    Raises:
        ValueError: `init_cache` makes no cache of these shapes.
    """
    slots = cache.full or cache.sliding
    room = 1 if slots is None else slots.positions.shape[1]

    def shapes(cache: Cache) -> dict[str, str]:
        leaves = jax.tree.leaves_with_path(cache)
        return {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
        }

    here, expected = shapes(cache), shapes(jax.eval_shape(lambda: init_cache(config, batch, room)))
    for name in expected | here:
        if here.get(name) != expected.get(name):
            raise ValueError(
                f"cache{name} is {here.get(name, 'absent')}, expected "
                f"{expected.get(name, 'absent')} on each device, as init_cache makes it for "
                f"{batch} sequences with {room} slots: a cache is that of one configuration, "
                "divided for one number of devices"
            )


def count_bytes(cache: Cache) -> int:
    """Bytes of keys, values and positions of a cache, which may have shapes in place of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def take_slots(
    cache: Cache,
    positions: Int[Array, "batch seq"],
    slot: Int[Array, ""],
    keep: Int[Array, ""],
    config: Config,
) -> tuple[Cache, dict[LayerType, Any]]:
    """Gives tokens their slots in all layers; see `assign_slots`.

    Returns:
        The cache, and the inputs of the blocks of each type.

    Raises:
        ValueError: the cache is that of another configuration, or of other sequences.
    """
    _check_shapes(cache, positions.shape[0], config)
    inputs: dict[LayerType, Any] = {}
    types: tuple[tuple[LayerType, LayerType], ...]
    types = ("full", "shared_full"), ("sliding", "shared_sliding")
    for type_, sharing in types:
        slots = getattr(cache, type_)
        if slots is None:
            continue
        c = type_config(config, type_)
        slots, here = assign_slots(slots, positions, slot, keep, type_, c)
        if config.shared_layers and here.origins is not None:
            shape = (1, *slots.keys.shape[1:3], here.key_positions.shape[1], c.head_dim)
            slots = slots._replace(recent=(jnp.zeros(shape, slots.keys.dtype),) * 2)
        cache = cache.replace(type_, slots)
        inputs |= {type_: here, sharing: here}
    if cache.linear is not None:
        inputs["linear"] = Steps(positions < NOWHERE, keep)
    return cache, inputs


def without_recent(cache: Cache) -> Cache:
    """The cache as it is between calls of `forward`."""
    return cache._replace(
        **{
            type_: slots._replace(recent=None)
            for type_ in ("full", "sliding")
            if (slots := getattr(cache, type_)) is not None
        }
    )


def assign_slots(
    slots: Slots,
    positions: Int[Array, "batch seq"],
    slot: Int[Array, ""],
    keep: Int[Array, ""] | int,
    layer_type: LayerType,
    config: Config,
) -> tuple[Slots, Inputs]:
    """Gives tokens their slots in all layers of a type; keys and values are written later.

    Args:
        slots: the slots of the layers.
        positions: the positions of the tokens.
        slot: the slot of the first token, counted from the beginning of the sequences.
        keep: the number of tokens, from the first on, that sliding layers keep.
        layer_type: the type of the layers.
        config: the configuration of the transformer.

    Returns:
        The slots with the positions of the tokens, and the inputs of the blocks.
    """
    seq, size = positions.shape[1], slots.positions.shape[1]
    window, rope = None, config.rope
    if layer_type == "sliding":
        window, rope = config.window, config.local_rope
    rotation = _rope.rotation(positions, rope, config.head_dim, size)
    if window is None or seq == 1:
        begin = slot if window is None else slot % size

        def put(positions: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots.positions, positions, begin, axis=1)

        inputs = Inputs(window, positions, put(positions), begin[None], None, rotation)
        # What leaves its slot leaves the window, too: a single token that is not kept leaves none.
        kept = positions if window is None else jnp.where(keep > 0, positions, NOWHERE)
        return slots._replace(positions=put(kept)), inputs
    # Counted back from the slot of the last token that is kept, slots are of the tokens before it.
    last = slot + keep - 1
    origins = keep - 1 - (last - jnp.arange(size)) % size
    count = min(seq, size)
    # The slots of the tokens may go on at the beginning.
    oldest = (last + 1 - count) % size
    first = jnp.minimum(oldest, size - count)
    begins = first[None] if count == size else jnp.stack([first, jnp.zeros_like(first)])
    keys = jnp.concatenate([slots.positions, positions], axis=1)
    inputs = Inputs(window, positions, keys, begins, origins, rotation)
    return slots._replace(positions=_pick(positions, slots.positions, origins, axis=1)), inputs


def to_bits(
    new: Float[Array, "batch seq kv_heads head_dim"],
) -> UInt[Array, "batch kv_heads seq head_dim"]:
    """Keys or values of some tokens, as the bit patterns that slots hold."""
    return _bit_patterns.to_bits(jnp.moveaxis(new, 1, 2))


def write(
    slots: Slots,
    key: UInt[Array, "batch kv_heads seq head_dim"],
    value: UInt[Array, "batch kv_heads seq head_dim"],
    layer: Int[Array, ""],
    inputs: Inputs,
) -> Slots:
    """Puts keys and values of some tokens into their slots."""

    def update(i: Array | int, slots: Slots) -> Slots:
        where = layer, inputs.slots[i], inputs.origins
        return slots._replace(
            keys=_write_to(slots.keys, key, *where), values=_write_to(slots.values, value, *where)
        )

    if len(inputs.slots) == 1:
        return update(0, slots)
    # In a loop, since XLA for CPUs would fuse the second write with the first, and copy all slots.
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
    """Keys or values of some rows and heads: those in slots, then the new ones, if any."""
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
    """Writes tokens to consecutive slots from `slot` on, but to no more than there are."""
    start = _starts(layer, 0, 0, slot, 0)
    if origins is not None:
        count = min(new.shape[2], stack.shape[3])
        shape = (1, *stack.shape[1:3], count, stack.shape[4])
        old = jax.lax.dynamic_slice(stack, start, shape)[0]
        origins = jax.lax.dynamic_slice_in_dim(origins, slot, count)
        new = _pick(new, old, origins, axis=2)
    return jax.lax.dynamic_update_slice(stack, new[None], start)


def _starts(*starts: Int[Array, ""] | int) -> tuple[Int[Array, ""], ...]:
    """Start indices of one dtype, as slicing wants them, whatever the default integers are."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)


def _pick(new: Array, old: Array, origins: Int[Array, " n"], axis: int) -> Array:
    """Elements of `new` along an axis, by the indices in `origins`; of `old` where negative."""
    shape = [1] * old.ndim
    shape[axis] = len(origins)
    picked = jnp.take(new, jnp.maximum(origins, 0), axis=axis, mode="clip")
    return jnp.where(origins.reshape(shape) >= 0, picked, old)
