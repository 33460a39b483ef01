"""Rows of compressed matrices, of which little more is decompressed than these rows.

In a matrix whose pairs are along columns, 64 rows are a band, which can be decoded alone. Whatever
has to be decoded of a matrix that is too large for it as a whole comes in pieces of some bands.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, BFloat16, Int, UInt16

from df11_jax._array import DF11Array, DF11Slice
from df11_jax._decode import decompress
from df11_jax._layout import TILE_COLS
from df11_jax._leaves import is_array, raw_value
from df11_jax._slices import Compressed, as_index, check_index, constant_index, decode_slices
from df11_jax._symbolic import holds

# Bytes of decompressed weights at a time. Products of that size are efficient on any device, and
# it is less than a block of all but the smallest models.
PIECE_BYTES = 64 * 2**20

_NAN = 0x7FC0  # as jax.numpy has it


def take(
    a: DF11Array | DF11Slice | BFloat16[Array, "rows ..."], indices: Int[Array, "*batch"]
) -> BFloat16[Array, "*batch_and_row"]:
    """Rows of a compressed tensor, such as embeddings of tokens: `jnp.take(a, indices, axis=0)`.

    Of a matrix whose first axis counts its rows, and whose pairs are along columns
    (`compress(embedding, along_columns=True)`), the 64 rows around each wanted one are
    decompressed, in pieces of at most 64 MiB if they are many; or, if more rows are wanted than it
    has such bands, all of it, piece by piece. Any other tensor is decompressed as a whole, and so
    is one that is sharded.

    It works under the same transformations as `decompress`; under `vmap`, all mapped rows of one
    matrix count together.

    Args:
        a: a compressed tensor without stack axes, or one slice of a stack; or an array.
        indices: the numbers of the rows; negative ones count from the end. Where there is no such
            row, the result is NaN.

    Raises:
        IndexError: `a` is a slice at an index, known before the program runs, that the stack lacks.
        TypeError: `a` or `indices` is of another type.
        ValueError: `a` is a stack, or has no axes.
    """
    a, indices = raw_value(a), jnp.asarray(indices)
    if isinstance(a, DF11Array):
        if a.stack_shape:
            raise ValueError(f"take: got a stack, {a!r}: take a slice of it")
        a = DF11Slice(a, constant_index(0))
    elif not isinstance(a, DF11Slice) and not is_array(a):
        raise TypeError(
            f"take: expected a DF11Array, a DF11Slice or an array, got {type(a).__name__}"
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"take: indices are {indices.dtype}, expected integers")
    if a.ndim < 1 or (isinstance(a, DF11Slice) and np.ndim(a.index)):
        raise ValueError(f"take: expected one tensor with rows, got shape {a.shape}")
    if not isinstance(a, DF11Slice):
        return jnp.take(a, indices, axis=0)
    check_index(a.index, math.prod(a.stack.stack_shape), "take")
    if not has_bands(a.stack):
        bits = jnp.take(_bits(decompress(a)), indices, axis=0, fill_value=_NAN)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return _take_rows(a, indices)


def scan_pieces(
    a: DF11Slice | BFloat16[Array, "rows k"],
    carry: Array,
    step: Callable[[Array, Int[Array, ""], BFloat16[Array, "some_rows k"]], Array],
    after: Any = None,
) -> Array:
    """`carry = step(carry, first_row, rows)` over all rows of a matrix, a piece at a time.

    The last piece begins early enough to be as large as the others, so some rows may come twice.
    Behind the last row there may be more, to the end of its band, which are not specified.

    Args:
        a: a matrix with pairs along columns, which is not divided; or an array, whose rows fill
            bands.
        carry: the carry for the first piece.
        step: a function that returns the carry for the next one.
        after: see `decode_slices`.
    """
    rows, k = a.shape[0], math.prod(a.shape[1:])
    bands, size = -(-rows // TILE_COLS), rows_in_piece(rows, k) // TILE_COLS

    def body(i: Int[Array, ""], carry: Array) -> Array:
        start = jnp.minimum(i * size, bands - size)
        if isinstance(a, DF11Slice):
            piece = _decode_bands(a, start + jnp.arange(size), after=(carry, after))
            piece = piece.reshape(size * TILE_COLS, k)
        else:
            piece = jax.lax.dynamic_slice_in_dim(a, start * TILE_COLS, size * TILE_COLS)
        return step(carry, start * TILE_COLS, piece)

    return jax.lax.fori_loop(0, -(-bands // size), body, carry)


def rows_in_piece(rows: int, k: int) -> int:
    """The number of rows that are decompressed at a time; pieces are as equal as possible."""
    bands = -(-rows // TILE_COLS)
    most = max(1, PIECE_BYTES // (2 * TILE_COLS * k))
    return TILE_COLS * -(-bands // -(-bands // most))


def has_bands(stack: Compressed) -> bool:
    """Whether `take` decompresses little more than the rows; of an empty stack there are none."""
    layout = stack.layout
    axes = layout.batch_axes, layout.row_axes
    is_matrix = layout.view.along_columns and axes == (0, 1)
    return is_matrix and not layout.parts and 0 not in stack.stack_shape


# Under jit even where the caller is not: its loop would else be compiled each time, and constants
# would be transfers, which users may forbid (`jax.transfer_guard`).
@functools.partial(jax.jit, inline=True)
def _take_rows(a: DF11Slice, indices: Int[Array, "*batch"]) -> BFloat16[Array, "*batch_and_row"]:
    """`take` of a matrix that has bands."""
    rows, *row = a.shape
    limits = jnp.iinfo(indices.dtype)  # clamped before they are narrowed
    flat = jnp.clip(indices.reshape(-1), max(limits.min, -rows - 1), min(limits.max, rows))
    flat = flat.astype(jnp.int32)
    flat = jnp.where(flat < 0, flat + rows, flat)
    is_there = (flat >= 0) & (flat < rows)
    bits = _take_bits(a, jnp.where(is_there, flat, 0))
    bits = jnp.where(is_there[:, None], bits, jnp.uint16(_NAN))
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).reshape(*indices.shape, *row)


@custom_vmap
def _take_bits(a: DF11Slice, rows: Int[Array, " n"]) -> UInt16[Array, "n k"]:
    """The bits of rows that there are."""
    return _take_bits_of_one(a, rows)


@_take_bits.def_vmap
def _take_mapped(size: int, are_mapped: Any, a: DF11Slice, rows: Array) -> tuple[Array, bool]:
    # All rows of one matrix count together, for what is decompressed at a time.
    of_a, of_rows = are_mapped
    if not any(jax.tree.leaves(of_a)):
        return _take_bits(a, rows.reshape(-1)).reshape(*rows.shape, -1), True
    axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, of_a), 0 if of_rows else None
    return jax.vmap(_take_bits_of_one, axes, axis_size=size)(a, rows), True


def _take_bits_of_one(a: DF11Slice, rows: Int[Array, " n"]) -> UInt16[Array, "n k"]:
    view = a.stack.layout.view
    if holds(lambda: rows.size < view.bands):
        size = rows_in_piece(view.n, view.k) // TILE_COLS
        return _in_pieces(lambda part: _decode_rows(a, part), rows, size)

    def choose(bits: Array, first: Array, piece: Array) -> Array:
        is_here = (rows >= first) & (rows < first + len(piece))
        found = _bits(piece)[jnp.clip(rows - first, 0, len(piece) - 1)]
        return jnp.where(is_here[:, None], found, bits)

    # Zeros made of all arrays: in a shard_map, a loop's state must start as it goes on, namely
    # different from device to device.
    differing = [jnp.ravel(array)[:1, None].astype(jnp.uint16) & 0 for array in jax.tree.leaves(a)]
    zeros = jnp.zeros((rows.size, view.k), jnp.uint16) + (rows[:, None] & 0).astype(jnp.uint16)
    return scan_pieces(a, sum(differing, zeros), choose)


def _decode_rows(a: DF11Slice, rows: Int[Array, " n"]) -> UInt16[Array, "n k"]:
    bands = _bits(_decode_bands(a, rows // TILE_COLS))
    return bands[jnp.arange(rows.size), rows % TILE_COLS]


def _decode_bands(
    a: DF11Slice, bands: Int[Array, " n"], after: Any = None
) -> BFloat16[Array, "n 64 k"]:
    stack = a.stack
    length = math.prod(stack.stack_shape)
    first = jnp.clip(as_index(a.index, length), 0, length - 1) * stack.layout.view.bands
    (decoded,) = decode_slices([stack], first + bands, names=["tensor"], after=after, bands=True)
    return decoded


def _bits(weights: BFloat16[Array, "..."]) -> UInt16[Array, "..."]:
    # XLA on a CPU selects from float32 copies of weights, which changes some NaNs.
    return jax.lax.bitcast_convert_type(weights, jnp.uint16)


def _in_pieces(function: Callable[[Array], Array], x: Int[Array, " n"], size: int) -> Array:
    """`function(x)`, computed from at most `size` elements at once."""
    if x.size <= size:
        return function(x)
    padded = jnp.pad(x, (0, -x.size % size)).reshape(-1, size)
    out = jax.lax.map(function, padded)
    return out.reshape(-1, *out.shape[2:])[: x.size]
