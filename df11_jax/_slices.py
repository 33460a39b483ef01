"""Slices of compressed stacks, decoded inside of traced programs."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int32, PyTree

from df11_jax import _layout
from df11_jax._layout import Layout
from df11_jax._local_slices import Decoding, decode_local
from df11_jax._partitioned import decode_divided

# XLA takes more than twice as long to compile a call of twice as many tensors.
_MOST_IN_A_CALL = 128

Arrays = TypeVar("Arrays", bound=PyTree)


class Compressed(Protocol):
    """The parts of a `DF11Array` that are needed to decode it."""

    @property
    def payload(self) -> tuple[Array, Array, Array, Array, Array]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def stack_shape(self) -> tuple[int, ...]: ...
    @property
    def slice_shape(self) -> tuple[int, ...]: ...


def decode_slices(
    arrays: Sequence[Compressed],
    index: Int32[Array, "*batch"],
    *,
    names: Sequence[str] | None = None,
    after: PyTree = None,
    bands: bool = False,
) -> list[BFloat16[Array, "*batch_and_slice"]]:
    """Decodes slices of several compressed stacks by one call, or by one for each 128 of them.

    Args:
        arrays: stacks with the same number of slices; several stack axes count as one.
        index: the index of the slice, or of slices. It is clamped to the stack, but for -1, for
            which nothing is decoded, and the result is not specified.
        names: the names of the tensors in error messages.
        after: arrays to be computed before decoding starts. In a loop, pass its carry: XLA would
            otherwise move decodes whose operands do not change to the front of the loop, or do
            several at once, and hold everything that they decode.
        bands: whether `index` counts the bands of all slices, 64 rows each: see `View`. Slices are
            matrices with pairs along columns, and not divided.

    Returns:
        The decoded slices of each stack, of shape `index.shape + slice_shape`; or bands, of shape
        `index.shape + (64, k)`, in which rows that a matrix does not have are not specified.

    Raises:
        IndexError: the index is known before the program runs, and there is no such slice.
        TypeError: the index is no integer.
        ValueError: the arrays of a stack do not fit each other, or the stacks differ in length.
    """
    if not arrays:
        return []
    names = tuple(names) if names is not None else tuple(f"tensor {i}" for i in range(len(arrays)))
    length = check_stacks(arrays, names)
    if bands:
        length *= _count_bands(arrays, names)
    check_index(index, length, names[0])
    index = as_index(index, length)
    if length == 0:
        return [jnp.zeros(index.shape + array.slice_shape, jnp.bfloat16) for array in arrays]
    return _decode(arrays, names, tie(index, after), "bands" if bands else "slices")


def check_index(index: Any, length: int, name: str) -> None:
    """Checks the index of slices of a stack, as far as it is known now.

    Args:
        index: integers; their values are checked if they are Python's or numpy's.
        length: the number of slices.
        name: the name of the tensor, for messages.

    Raises:
        IndexError: there is no such slice.
        TypeError: these are no integers.
    """
    if isinstance(index, (list, tuple)):
        raise TypeError(
            f"{name}: the index of a slice is {index!r}, expected an integer, or an array of them"
        )
    dtype = jax.dtypes.result_type(index)
    if not np.issubdtype(dtype, np.integer):
        raise TypeError(f"{name}: the index of a slice has dtype {dtype}, expected integers")
    if isinstance(index, jax.Array) or not length:
        return
    values = np.asarray(index)
    least = -1 if values.ndim else 0  # in arrays, -1 stands for no slice
    wrong = values[(values < least) | (values >= length)]
    if wrong.size:
        raise IndexError(f"{name}: there is no slice {wrong[0]} in a stack of {length}")


def as_index(index: Any, length: int) -> Int32[Array, "*batch"]:
    """The index of slices of a stack as the decoder takes it; what is -1 or too large remains so.

    Args:
        index: integers of any type.
        length: the number of slices.
    """
    index = jnp.asarray(index)
    limits = np.iinfo(index.dtype)
    if limits.max > np.iinfo(np.int32).max:  # clamped before it is narrowed
        index = jnp.clip(index, max(-2, limits.min), length)
    return index.astype(jnp.int32)


def decode_stacks(arrays: Sequence[Compressed], names: Sequence[str]) -> list[Array]:
    """Decodes all slices of stacks with the same axes."""
    if check_stacks(arrays, names) == 0:
        return [jnp.zeros(a.stack_shape + a.slice_shape, jnp.bfloat16) for a in arrays]
    return _decode(arrays, names, constant_index(0), "all")


@functools.partial(jax.jit, static_argnums=0, inline=True)
def constant_index(index: int) -> Int32[Array, ""]:
    """An index, made on the device: users may forbid transfers (`jax.transfer_guard`)."""
    return jnp.int32(index)


def _count_bands(arrays: Sequence[Compressed], names: Sequence[str]) -> int:
    """The number of bands of a slice, which stacks have in common."""
    for array, name in zip(arrays, names, strict=True):
        if array.layout.parts or not array.layout.view.along_columns:
            raise ValueError(f"{name}: rows of slices with {array.layout} cannot be decoded alone")
    (count,) = {array.layout.view.bands for array in arrays}
    return count


def check_stacks(arrays: Sequence[Compressed], names: Sequence[str]) -> int:
    """The number of slices, which stacks have in common.

    Raises:
        TypeError: a stack holds the shapes of arrays in place of arrays.
        ValueError: the arrays of a stack do not fit each other, the stacks differ in length, one
            is sharded that is not divided, or is in the host's memory.
    """
    lengths = []
    # Elsewhere, an axis of a stack that is taken for one of parts would go unnoticed.
    some_parts = bool(jax.sharding.get_abstract_mesh().manual_axes)
    for array, name in zip(arrays, names, strict=True):
        if any(isinstance(part, jax.ShapeDtypeStruct) for part in array.payload):
            raise TypeError(
                f"{name}: expected compressed arrays, got their shapes. jax.eval_shape passes "
                "shapes to a function, and returns the shapes of what that returns"
            )
        stack = _layout.check_payload(array.payload, array.layout, name, some_parts=some_parts)
        if any(map(_is_in_host_memory, array.payload)):
            raise ValueError(
                f"{name}: is in the host's memory, and is decompressed in the device's: "
                "jax.device_put(array, jax.memory.Space.Device) copies it there"
            )
        if not array.layout.parts and any(is_split(leaf) for leaf in array.payload):
            raise ValueError(
                f"{name}: is sharded over explicit axes of a mesh, and was not compressed for "
                "that. df11_jax.device_put divides it; a jax.shard_map takes it as it is"
            )
        lengths.append(math.prod(stack))
        if lengths[-1] != lengths[0]:
            raise ValueError(
                f"{name}: a stack of {lengths[-1]} slices, expected {lengths[0]} like {names[0]}"
            )
    return lengths[0]


def _decode(
    arrays: Sequence[Compressed],
    names: Sequence[str],
    index: Int32[Array, "*batch"],
    wanted: Literal["slices", "bands", "all"],
) -> list[Array]:
    """Decodes slices, those that are divided into parts where these are."""
    weights: dict[int, Array] = {}
    divided = [bool(array.layout.parts and array.layout.view.size) for array in arrays]
    for function, is_divided in ((decode_local, False), (decode_divided, True)):
        todo = [i for i, one in enumerate(divided) if one == is_divided]
        while todo:
            members, todo = todo[:_MOST_IN_A_CALL], todo[_MOST_IN_A_CALL:]
            decoding = Decoding(
                tuple(arrays[i].layout for i in members), tuple(names[i] for i in members), wanted
            )
            payloads = [leaf for i in members for leaf in arrays[i].payload]
            weights |= zip(members, function(decoding, index, *payloads), strict=True)
    return [weights[i] for i in range(len(arrays))]


def tie(arrays: Arrays, inputs: PyTree) -> Arrays:
    """The same arrays, which XLA believes to depend on `inputs`."""
    # Without stop_gradient, the barrier would give the arrays tangents, as arrays of zeros.
    leaves = [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(inputs) if _is_number(leaf)]
    return jax.lax.optimization_barrier((arrays, leaves))[0] if leaves else arrays


def _is_in_host_memory(leaf: Array) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def is_split(leaf: Any) -> bool:
    """Whether an array is sharded by its type, in which case it cannot be decoded."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
