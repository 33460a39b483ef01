"""Compression of one tensor, on the host."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array, BFloat16

from df11_jax._array import DF11Array, is_df11
from df11_jax._brief import brief
from df11_jax._host_arrays import BFLOAT16, to_host
from df11_jax._host_codec import encode
from df11_jax._layout import Layout, make_layout
from df11_jax._leaves import as_array
from df11_jax._like import Form, check_is_like
from df11_jax._select import is_castable
from df11_jax._shards import Shards, encode_shards


def compress(
    array: BFloat16[Array, "..."] | BFloat16[np.ndarray, "..."],
    *,
    like: DF11Array | None = None,
    stack_axes: int = 0,
    batch_axes: int = 0,
    row_axes: int | None = None,
    along_columns: bool = False,
    verify: bool = True,
    threads: int | None = None,
) -> DF11Array:
    """Compresses one bfloat16 tensor, on the host.

    A contiguous numpy array, or JAX array on the CPU, is read without a copy. An array on a mesh
    (with a `NamedSharding`) is compressed shard by shard, and each device keeps its share: the
    result is sharded by the same PartitionSpec.

    Args:
        array: a bfloat16 array of any shape, with at most 8 dimensions besides its stack axes.
        like: a compressed tensor, or one of shapes, whose five arrays those of the result are to
            be like, so that what is compiled for it takes the result. It says how the tensor is
            compressed, in place of the next four arguments; `array` says where the result is.
        stack_axes: the number of leading axes that are a stack (of layers, say). Each slice along
            them gets a codebook of its own, and can be decompressed alone.
        batch_axes: the number of the next axes that count matrices: a slice `[heads, d, head_dim]`
            with one of them is `heads` matrices.
        row_axes: the number of axes after these that are the rows of a matrix, for products with
            the compressed weights; the others are its columns. None for all axes but the last.
        along_columns: whether pairs of weights are coded along the columns, for products with the
            transpose (`h @ E.T` with `E [vocab, d]`), instead of along the rows (`x @ W`).
        verify: decode the result, and compare it with `array` bit by bit.
        threads: the number of threads; None for all that this process may run on.

    Returns:
        The compressed tensor, where `array` is; on the default device if that is a numpy array.
        `decompress` of it is `array`, bit for bit.

    Raises:
        TypeError: `array` is traced, or not bfloat16; `like` is not compressed; `threads`, or a
            number of axes, is not an integer; `along_columns` is neither True nor False.
        ValueError: `array` has more than 8 dimensions besides its stack axes, or fewer dimensions
            than `stack_axes`; it is on several devices and no mesh; it is of another shape than
            `like`, is sharded otherwise, or does not fit into its arrays; there is another
            argument for what `like` says; or `threads` is below 1.
        RuntimeError: verification failed, which means broken hardware or a bug.
    """
    if like is not None:
        if not is_df11(like):
            raise TypeError(f"like: expected a DF11Array, got {type(like).__name__}")
        if stack_axes or batch_axes or row_axes is not None or along_columns:
            raise ValueError(
                "like says how the tensor is compressed: leave out stack_axes, batch_axes, "
                "row_axes and along_columns"
            )
        weights = as_weights(array, "array", cast=False)
        check_is_like("array", as_array(array), like, cast=False)
        form = Form.of(like)
        return encode_tensor(weights, "array", form.layout, form, verify=verify, threads=threads)
    if not isinstance(along_columns, (bool, np.bool_)):
        raise TypeError(f"along_columns: expected True or False, got {brief(along_columns)}")
    return compress_tensor(
        array,
        "array",
        _as_count("stack_axes", stack_axes),
        verify,
        threads,
        batch_axes=_as_count("batch_axes", batch_axes),
        row_axes=None if row_axes is None else _as_count("row_axes", row_axes),
        along_columns=bool(along_columns),
    )


def _as_count(argument: str, value: Any) -> int:
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {brief(value)}") from None


def compress_tensor(
    array: Any,
    name: str,
    stack_axes: int,
    verify: bool,
    threads: int | None,
    *,
    cast: bool = False,
    axis: int = 0,
    where: Any = None,
    **matrix: Any,
) -> DF11Array:
    """`compress` of an array, or of what stands for one.

    Args:
        array: the array.
        name: its name; errors have it.
        stack_axes: see `compress`.
        verify: see `compress`.
        threads: see `compress`.
        cast: whether to round float32 and float16.
        axis: the axis to bring to the front.
        where: where the compressed tensor is to be, before that; None for where the array is.
        matrix: the arguments of `make_layout` about the matrices of a slice.
    """
    weights = as_weights(array, name, cast, axis, where)
    if isinstance(weights, Shards):
        shape, parts = weights.shape, weights.parts[stack_axes:]
    else:
        shape, parts = weights.array.shape, ()
    if not 0 <= stack_axes <= len(shape):
        raise ValueError(
            f"{name}: cannot take {stack_axes} stack axes from an array of shape {shape}"
        )
    try:
        layout = make_layout(shape[stack_axes:], parts=parts, **matrix)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return encode_tensor(weights, name, layout, verify=verify, threads=threads)


def compress_as(array: Any, layout: Layout, name: str, where: Any = None) -> DF11Array:
    """Compresses a tensor as another one was: with the same layout.

    Args:
        array: a bfloat16 array; its axes before those of the layout are a stack.
        layout: the layout of its slices.
        name: the name of the tensor; errors have it.
        where: the device or sharding that it is to have; None for where it is.
    """
    return encode_tensor(as_weights(array, name, cast=False, where=where), name, layout)


class Whole(NamedTuple):
    """A tensor on the host.

    Attributes:
        array: the weights, in bfloat16 and contiguous.
        device: where the compressed tensor is to be; None for the default device.
        is_committed: whether it is to stay there in computations with what is elsewhere.
    """

    array: np.ndarray
    device: jax.Device | jax.sharding.Sharding | None
    is_committed: bool


def encode_tensor(
    weights: Whole | Shards,
    name: str,
    layout: Layout,
    form: Form | None = None,
    **options: Any,
) -> DF11Array:
    """Encodes a tensor, and puts what it becomes where that is to be.

    Args:
        weights: the tensor.
        name: its name; errors have it.
        layout: the layout of its slices.
        form: what its arrays are to be like; None for arrays as they come.
        options: those of `encode`.
    """
    if isinstance(weights, Shards):
        small = encode_shards(weights, name, layout, **options)
        return small if form is None else form.fit(small, name)
    small = DF11Array.from_payload(encode(weights.array, name, layout, **options), layout)
    if form is not None:
        small = form.fit(small, name)
    if weights.is_committed or weights.device is None:
        return jax.device_put(small, weights.device)
    with jax.default_device(weights.device):
        return jax.device_put(small)


def as_weights(
    array: Any, name: str, cast: bool, axis: int = 0, where: Any = None
) -> Whole | Shards:
    """A tensor to be encoded, in bfloat16.

    Args:
        array: the array, or what stands for one.
        name: the name of the tensor; errors have it.
        cast: whether to round float32 and float16.
        axis: the axis to bring to the front.
        where: where the compressed tensor is to be; None for where the array is.
    """
    array = as_array(array)
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{name}: compression runs on the host and needs a concrete array, got a traced one "
            f"({array.aval}). Compress outside of jit, and pass the DF11Array in"
        )
    if isinstance(array, DF11Array):
        raise TypeError(f"{name}: is compressed already ({array!r})")
    if isinstance(array, jax.ShapeDtypeStruct):
        raise TypeError(f"{name}: expected an array, got the shape of one, {array}")
    if isinstance(array, np.ma.MaskedArray):  # JAX refuses them, too
        raise TypeError(f"{name}: expected an array, got a masked one: pass array.filled(value)")
    to_weights = functools.partial(_to_weights, like=array, name=name, cast=cast, axis=axis)
    is_committed = where is not None
    if where is None and isinstance(array, jax.Array):
        where, is_committed = array.sharding, array.committed
        if not is_committed and isinstance(where, SingleDeviceSharding):
            (where,) = array.devices()
    if isinstance(where, NamedSharding):
        return Shards.of(array, where, axis, to_weights)
    if isinstance(where, jax.sharding.Sharding) and len(where.device_set) > 1:
        raise ValueError(
            f"{name}: expected a NamedSharding, got {type(where).__name__}: bring it onto a mesh "
            "first, jax.device_put(array, NamedSharding(mesh, PartitionSpec(...)))"
        )
    return Whole(to_weights(to_host(array)), where, is_committed)


def _to_weights(weights: np.ndarray, like: Any, name: str, cast: bool, axis: int) -> np.ndarray:
    """Contiguous bfloat16 weights, of an array (or one shard of it) on the host."""
    if axis:
        weights = np.moveaxis(weights, axis, 0)
    if cast and is_castable(weights.dtype):
        weights = weights.astype(BFLOAT16, order="C")
    if weights.dtype != BFLOAT16:
        if not hasattr(like, "dtype"):
            raise TypeError(
                f"{name}: expected a bfloat16 array, got {type(like).__name__}. "
                "compress_params takes pytrees of arrays"
            )
        raise TypeError(
            f"{name}: expected bfloat16, got {weights.dtype}. "
            "Cast it first, if rounding is acceptable: array.astype(jax.numpy.bfloat16)"
        )
    return np.ascontiguousarray(weights).reshape(weights.shape)
