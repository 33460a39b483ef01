"""Builders of leaves, which are filled tensor by tensor on the host, then moved to the device."""

import functools
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, BFloat16, Shaped

from df11_jax._array import DF11Array
from df11_jax._decode import decompress
from df11_jax._host_arrays import BFLOAT16, empty_aligned
from df11_jax._host_codec import encode
from df11_jax._layout import Layout, make_layout
from df11_jax._placement import on_mesh
from df11_jax._select import is_candidate, is_worth_keeping
from df11_jax._stack import StackBuilder
from df11_jax.models._experts import EXPERTS, ROUTERS
from df11_jax.models._processes import find_longest, put_shards
from df11_jax.models._sharding import TABLES, DeviceOrSharding

_BAND = 64  # rows that are transposed at a time: two cache lines of each row of the result


def count_stack_axes(path: Sequence[str]) -> int:
    """The number of stack axes of the leaf at a path: layers, or devices; and experts."""
    return 2 if EXPERTS in path else 1


def is_candidate_leaf(path: Sequence[str], shape: tuple[int, ...]) -> bool:
    """Whether a leaf is to be compressed, if that makes it smaller.

    Only stacks of matrices are: vectors and convolutions, of which a block has few, stay plain, and
    so do routers, which tell what is decompressed.
    """
    axes = count_stack_axes(path)
    is_matrix = len(shape) - axes == 2 and not ROUTERS & set(path)
    if path[0] in TABLES and slice_layout(path, shape).view.is_flat:
        return False  # no rows could be decompressed alone
    return is_matrix and is_candidate(shape, BFLOAT16, stack_axes=axes)


def slice_layout(path: Sequence[str], shape: tuple[int, ...]) -> Layout:
    """The layout of the matrices that a leaf is a stack of.

    An output head is multiplied by the transpose of its rows, and so is an embedding that is tied
    to it; all tables are stored alike.
    """
    return make_layout(shape[count_stack_axes(path) :], along_columns=path[0] in TABLES)


class LeafBuilder(Protocol):
    """A builder of a leaf, or of what this process has of it."""

    def put(self, start: int, slices: BFloat16[np.ndarray, "slices ..."], name: str) -> None:
        """Adds slices `start, start + 1, ...`, counted over all axes of the stack.

        Args:
            start: the index of the first one.
            slices: the slices.
            name: the name of their tensor, for messages.
        """

    def build(self, where: DeviceOrSharding) -> Array | DF11Array:
        """The leaf, on its devices; the builder is of no use afterwards.

        All processes of these devices have to call this.
        """


class PlainLeafBuilder:
    """A builder of a leaf that is not compressed."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._array = empty_aligned(shape, dtype)

    def put(self, start: int, slices: BFloat16[np.ndarray, "slices ..."], name: str) -> None:
        """Adds slices."""
        flat = self._array.reshape(-1, *slices.shape[1:])
        flat[start : start + len(slices)] = slices

    def build(self, where: DeviceOrSharding) -> Array:
        """The leaf, on its devices."""
        array = self._array
        del self._array
        return put_shards(array, where)


class CompressedLeafBuilder:
    """A builder of a stack of compressed matrices, or of plain ones if these are smaller."""

    def __init__(
        self, path: Sequence[str], shape: tuple[int, ...], verify: bool, threads: int | None
    ) -> None:
        self._layout = slice_layout(path, shape)
        self._builder = StackBuilder(shape[: count_stack_axes(path)], self._layout)
        self._verify = verify
        self._threads = threads

    def put(self, start: int, slices: BFloat16[np.ndarray, "slices ..."], name: str) -> None:
        """Compresses slices."""
        payload = encode(slices, name, self._layout, verify=self._verify, threads=self._threads)
        self._builder.put(start, payload)

    def build(self, where: DeviceOrSharding) -> Array | DF11Array:
        """The leaf, on its devices."""
        words = find_longest(self._builder.longest(), where)
        array = self._builder.build(functools.partial(put_shards, where=where), words)
        # By the sizes of the whole leaf, so that all processes decide alike.
        if is_worth_keeping(array.compressed_nbytes, array.nbytes):
            return array
        if isinstance(where, NamedSharding):
            # Otherwise each device would gather and decompress all of it.
            mesh, spec = where.mesh, where.spec
            assert isinstance(mesh, Mesh)
            here = jax.shard_map(decompress, mesh=mesh, in_specs=spec, out_specs=spec)
            with on_mesh(mesh):
                return jax.jit(here, out_shardings=where)(array)
        with on_mesh(None):
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
