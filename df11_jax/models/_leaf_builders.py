"""Builders of leaves, which are filled tensor by tensor on the host, then moved to the device."""

from concurrent.futures import Executor
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, BFloat16, Shaped

from df11_jax._array import DF11Array
from df11_jax._decode import decompress
from df11_jax._host_arrays import BFLOAT16, empty_aligned
from df11_jax._host_codec import encode
from df11_jax._layout import Layout, make_layout
from df11_jax._select import is_candidate, is_worth_keeping
from df11_jax._stack import StackBuilder
from df11_jax.models._sharding import DeviceOrSharding

_BAND = 64  # rows that are transposed at a time: two cache lines of each row of the result


def is_candidate_stack(shape: tuple[int, ...]) -> bool:
    """Whether a leaf with one stack axis is to be compressed, if that makes it smaller.

    Only matrices are: vectors and convolutions, of which a block has few, stay plain.
    """
    return len(shape) == 3 and is_candidate(shape, BFLOAT16, stack_axes=1)


def slice_layout(shape: tuple[int, ...], is_table: bool) -> Layout:
    """The layout of the slices of a leaf with one stack axis.

    An output head is multiplied by the transpose of its rows, and so is an embedding that is tied
    to it; all tables are stored alike.
    """
    return make_layout(shape[1:], along_columns=is_table)


class LeafBuilder(Protocol):
    """A builder of a leaf."""

    def put(self, start: int, slices: BFloat16[np.ndarray, "slices ..."], name: str) -> None:
        """Adds slices `start, start + 1, ...` along the first axis; `name` is for messages."""

    def build(self, where: DeviceOrSharding) -> Array | DF11Array:
        """The leaf, on its devices; the builder is of no use afterwards."""


class PlainLeafBuilder:
    """A builder of a leaf that is not compressed."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._array = empty_aligned(shape, dtype)

    def put(self, start: int, slices: BFloat16[np.ndarray, "slices ..."], name: str) -> None:
        """Adds slices along the first axis."""
        self._array[start : start + len(slices)] = slices

    def build(self, where: DeviceOrSharding) -> Array:
        """The leaf, on its devices."""
        array = self._array
        del self._array
        return jax.device_put(array, where)


class CompressedLeafBuilder:
    """A builder of a compressed leaf with one stack axis, or of a plain one if that is smaller."""

    def __init__(
        self, shape: tuple[int, ...], is_table: bool, verify: bool, threads: int | None
    ) -> None:
        self._layout = slice_layout(shape, is_table)
        self._builder = StackBuilder(shape[0], self._layout)
        self._verify = verify
        self._threads = threads

    def put(self, start: int, slices: BFloat16[np.ndarray, "slices ..."], name: str) -> None:
        """Compresses slices along the first axis."""
        payload = encode(slices, name, self._layout, verify=self._verify, threads=self._threads)
        self._builder.put(start, payload)

    def build(self, where: DeviceOrSharding) -> Array | DF11Array:
        """The leaf, on its devices."""
        array = self._builder.build(where)
        if is_worth_keeping(array.compressed_nbytes, array.nbytes):
            return array
        if isinstance(where, NamedSharding):
            # Otherwise each device would gather and decompress all of it.
            spec = where.spec
            here = jax.shard_map(decompress, mesh=where.mesh, in_specs=spec, out_specs=spec)
            return jax.jit(here)(array)
        return decompress(array)


def transpose(
    matrix: Shaped[np.ndarray, "rows cols"], pool: Executor
) -> Shaped[np.ndarray, "cols rows"]:
    """The transpose of a matrix of 2-byte elements, contiguous, in the threads of a pool.

    numpy copies element by element, in strides that miss every cache. Here four rows are zipped
    into 8-byte elements first, and these are copied, a band of rows at a time.
    """
    rows, cols = matrix.shape
    if rows % 4:
        return np.ascontiguousarray(matrix.T)
    bits = matrix.view(np.uint16)
    out = np.empty((cols, rows), np.uint16)
    out_quads = out.view(np.uint64)

    def move(begin: int) -> None:
        band = bits[begin : begin + _BAND]
        zipped = np.empty((len(band) // 4, cols, 4), np.uint16)
        for i in range(4):
            zipped[:, :, i] = band[i::4]
        quads = zipped.view(np.uint64)[:, :, 0]
        out_quads[:, begin // 4 : begin // 4 + len(quads)] = quads.T

    list(pool.map(move, range(0, rows, _BAND)))
    return out.view(matrix.dtype)
