"""Slices of compressed stacks, decoded inside of traced programs.

All tensors that are wanted together are decoded by one FFI call, which gets whole stacks and the
index of the slice: handing it slices would make XLA copy them first.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int32, PyTree

from df11_jax import _ffi, _layout, _parts, _xla_decoder
from df11_jax._ffi_call import DecoderCall, call_decoder
from df11_jax._layout import Layout

Arrays = TypeVar("Arrays", bound=PyTree)


class Compressed(Protocol):
    """The parts of a `DF11Array` that are needed to decode it."""

    @property
    def payload(self) -> tuple[Array, Array, Array, Array, Array]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def stack_shape(self) -> tuple[int, ...]: ...


def decode_slices(
    arrays: Sequence[Compressed],
    index: Int32[Array, "*batch"],
    *,
    names: Sequence[str] | None = None,
    after: PyTree = None,
) -> list[BFloat16[Array, "*batch_and_slice"]]:
    """Decodes slices of several compressed stacks by one call.

    Args:
        arrays: stacks with the same number of slices; several stack axes count as one.
        index: the index of the slice, or of slices. It is clamped to the stack, but for -1, for
            which nothing is decoded, and the result is not specified.
        names: the names of the tensors in error messages.
        after: arrays to be computed before decoding starts. In a loop, pass its carry: XLA would
            otherwise move decodes whose operands do not change to the front of the loop, or do
            several at once, and hold everything that they decode.

    Returns:
        The decoded slices of each stack, of shape `index.shape + slice_shape`.

    Raises:
        ValueError: the arrays of a stack do not fit each other, or the stacks differ in length.
    """
    if not arrays:
        return []
    names = tuple(names) if names is not None else tuple(f"tensor {i}" for i in range(len(arrays)))
    lengths = []
    for array, name in zip(arrays, names, strict=True):
        stack = _layout.check_payload(array.payload, array.layout, name)
        if any(_is_split(leaf) for leaf in array.payload):
            raise ValueError(
                f"{name}: is sharded over explicit axes of a mesh; decompress it in a "
                "jax.shard_map, or make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
            )
        lengths.append(math.prod(stack))
        if lengths[-1] != lengths[0]:
            raise ValueError(
                f"{name}: a stack of {lengths[-1]} slices, expected {lengths[0]} like {names[0]}"
            )
    index = jnp.asarray(index, jnp.int32)
    if lengths[0] == 0:
        return [jnp.zeros(index.shape + array.layout.shape, jnp.bfloat16) for array in arrays]
    index = tie(index, after)
    weights: dict[int, Array] = {}
    counts = [array.layout.count_parts for array in arrays]
    for count in dict.fromkeys(counts):
        members = [i for i in range(len(arrays)) if counts[i] == count]
        decoded = _decode_parts(
            [arrays[i] for i in members], [names[i] for i in members], index, lengths[0], count
        )
        weights |= zip(members, decoded, strict=True)
    return [weights[i] for i in range(len(arrays))]


def _decode_parts(
    arrays: Sequence[Compressed],
    names: Sequence[str],
    index: Int32[Array, "*batch"],
    length: int,
    count: int | None,
) -> list[BFloat16[Array, "*batch_and_slice"]]:
    """Decodes slices that are divided into as many parts, or that are not divided, by one call.

    Args:
        arrays: stacks with the same number of slices.
        names: the name of each, for messages.
        index: the indices of the slices.
        length: the number of slices in a stack.
        count: the number of parts of a slice; None if slices are not divided.
    """
    if count is not None:
        first = jnp.clip(index, 0, length - 1) * count
        parts = first[..., None] + jnp.arange(count, dtype=jnp.int32)
        index = jnp.where(index[..., None] == -1, -1, parts)
    ones = (1,) * index.ndim
    payloads = tuple(
        jnp.reshape(leaf, (*ones, length * (count or 1), leaf.shape[-1]))
        for array in arrays
        for leaf in array.payload
    )
    layouts = tuple(array.layout for array in arrays)
    headers = tuple(word for layout in layouts for word in _layout.pack_header(layout).tolist())
    decoder = DecoderCall(
        _ffi.DECODE_TARGET,
        "expand_dims",
        attributes=(("names", "\n".join(names)), ("headers", headers)),
        xla=_decode_by_xla,
        static=(layouts,),
    )
    weights = call_decoder(decoder, index, *payloads)
    if count is None:
        return list(weights)
    batch = index.shape[:-1]
    return [
        _parts.join(w.reshape(*batch, *layout.parts, *layout.part_shape), layout)
        for w, layout in zip(weights, layouts, strict=True)
    ]


def decode_stacks(arrays: Sequence[Compressed], names: Sequence[str]) -> list[Array]:
    """Decodes all slices of stacks with the same axes."""
    stack = arrays[0].stack_shape
    if not stack:
        return decode_slices(arrays, jnp.int32(0), names=names)
    weights = decode_slices(arrays, jnp.arange(math.prod(stack), dtype=jnp.int32), names=names)
    return [w.reshape(stack + a.layout.shape) for w, a in zip(weights, arrays, strict=True)]


def tie(arrays: Arrays, inputs: PyTree) -> Arrays:
    """The same arrays, which XLA believes to depend on `inputs`."""
    # Without stop_gradient, the barrier would give the arrays tangents, as arrays of zeros.
    leaves = [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(inputs) if _is_number(leaf)]
    return jax.lax.optimization_barrier((arrays, leaves))[0] if leaves else arrays


def _is_split(leaf: Any) -> bool:
    """Whether an array is sharded by its type, in which case it cannot be decoded."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _decode_by_xla(
    layouts: tuple[Layout, ...], index: Array, *payloads: Array
) -> tuple[Array, ...]:
    # Index and headers may be tied to other values, and all arrays are read after these, too.
    index, payloads = jax.lax.optimization_barrier((index, payloads))
    each = len(_layout.PAYLOAD)
    return tuple(
        _xla_decoder.decode(index, *payloads[each * i : each * (i + 1)], layout=layout)
        for i, layout in enumerate(layouts)
    )
