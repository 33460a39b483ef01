"""Embeddings and output heads as stacks of row groups, of which few are decompressed at a time.

A table [vocab, dim] is kept as [groups, rows, dim], its last group padded with zeros. If it is
compressed, each group is a slice of the stack, and can be decompressed alone: to look up a token,
its group is decompressed, and the output head goes through the table in pieces. A head that is no
embedding has groups as large as pieces, each of which one fused product can read.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from df11_jax import _ffi
from df11_jax._array import DF11Array, DF11Slice
from df11_jax._layout import TILE_COLS, round_up
from df11_jax._product import can_fuse, dot
from df11_jax._slices import decode_slices

# Of a table that tokens are looked up in: two tiles of the compressed layout. Smaller groups would
# be compressed less well.
ROWS = 128

# Bytes of decompressed weights at a time. Products of that size are efficient on any device, and
# it is less than a block of all but the smallest models.
PIECE_BYTES = 64 * 2**20

Table = BFloat16[Array, "groups rows dim"] | DF11Array


def table_shape(vocab: int, dim: int) -> tuple[int, int, int]:
    """Shape of the table of a vocabulary."""
    return -(-vocab // ROWS), ROWS, dim


def head_shape(vocab: int, dim: int) -> tuple[int, int, int]:
    """Shape of an output head that no tokens are looked up in: each group is a piece."""
    least = max(1, -(-2 * vocab * dim // PIECE_BYTES))

    def shape(groups: int) -> tuple[int, int, int]:
        rows = round_up(-(-vocab // groups), TILE_COLS)
        return -(-vocab // rows), rows, dim

    # Of about as few as there can be, the number of pieces that pads least.
    shapes = map(shape, range(least, least + least // 4 + 1))
    return min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def look_up(table: Table, tokens: Int[Array, "*batch"]) -> BFloat16[Array, "*batch dim"]:
    """The rows of some tokens.

    If the table is compressed, the groups of the tokens are decompressed, in pieces if they are
    many. If it has no more groups than there are tokens, all of it is decompressed, piece by piece.
    """
    groups, _, dim = table.shape
    if not isinstance(table, DF11Array):
        return table.reshape(-1, dim)[tokens]
    flat = tokens.reshape(-1)
    if flat.size < groups:
        out = _in_pieces(lambda part: _decode_rows(table, part), flat, groups_in_piece(table))
    else:

        def choose(out: Array, first: Array, piece: Array) -> Array:
            # As integers: XLA on a CPU would select from float32 copies, which changes some NaNs.
            rows = jax.lax.bitcast_convert_type(piece, jnp.uint16)
            is_here = (flat >= first) & (flat < first + len(rows))
            found = rows[jnp.clip(flat - first, 0, len(rows) - 1)]
            return jnp.where(is_here[:, None], found, out)

        bits = scan_pieces(table, jnp.zeros((flat.size, dim), jnp.uint16), choose)
        out = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return out.reshape(*tokens.shape, dim)


def project(
    table: Table, x: Float[Array, "*batch dim"], fuse: bool = False
) -> Float[Array, "*batch rows_of_all"]:
    """Float32 products of `x` and all rows, those that pad the last group included.

    Args:
        table: the table.
        x: what to multiply with.
        fuse: whether the products with compressed groups may be fused, one for each.
    """
    if (
        fuse
        and isinstance(table, DF11Array)
        and table.layout.along_columns  # else `dot` would multiply by the transpose
        and can_fuse(table, math.prod(x.shape[:-1]))
    ):
        # Elsewhere, the groups would all be decompressed at once.
        compiled = dict.fromkeys(_ffi.product_platforms(), _project_fused)
        return jax.lax.platform_dependent(table, x, **compiled, default=_project_in_pieces)
    return _project_in_pieces(table, x)


def _project_fused(table: DF11Array, x: Array) -> Array:
    slices = (DF11Slice(table, jnp.int32(i)) for i in range(table.shape[0]))
    products = [dot(x, each, preferred_element_type=jnp.float32) for each in slices]
    return jnp.concatenate(products, axis=-1)


def _project_in_pieces(table: Table, x: Array) -> Array:
    groups, rows, _ = table.shape

    def add(logits: Array, first: Int[Array, ""], piece: Array) -> Array:
        products = jnp.einsum(
            "...d,vd->...v", x, piece.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice_in_dim(logits, products, first, axis=-1)

    logits = jnp.zeros((*x.shape[:-1], groups * rows), jnp.float32)
    return scan_pieces(table, logits, add, after=x)


def groups_in_piece(table: Table) -> int:
    """The number of groups that are decompressed at a time; pieces are as equal as possible."""
    groups, rows, dim = table.shape
    most = max(1, PIECE_BYTES // (2 * rows * dim))
    return -(-groups // -(-groups // most))


def scan_pieces(
    table: Table,
    carry: Array,
    step: Callable[[Array, Int[Array, ""], BFloat16[Array, "some_rows dim"]], Array],
    after: Any = None,
) -> Array:
    """`carry = step(carry, first_row, rows)` over all rows, a piece at a time.

    The last piece begins early enough to be as large as the others, so some rows may come twice.
    """
    groups, rows, dim = table.shape
    size = groups_in_piece(table)

    def body(i: Int[Array, ""], carry: Array) -> Array:
        start = jnp.minimum(i * size, groups - size)
        if isinstance(table, DF11Array):
            (piece,) = decode_slices(
                [table], start + jnp.arange(size), names=["table"], after=(carry, after)
            )
        else:
            piece = jax.lax.dynamic_slice_in_dim(table, start, size)
        return step(carry, start * rows, piece.reshape(size * rows, dim))

    return jax.lax.fori_loop(0, -(-groups // size), body, carry)


def _decode_rows(table: DF11Array, tokens: Int[Array, " n"]) -> BFloat16[Array, "n dim"]:
    rows = table.shape[1]
    (decoded,) = decode_slices([table], tokens // rows, names=["table"])
    return decoded[jnp.arange(tokens.size), tokens % rows]


def _in_pieces(function: Callable[[Array], Array], x: Int[Array, " n"], size: int) -> Array:
    """`function(x)`, computed from at most `size` elements at once."""
    if x.size <= size:
        return function(x)
    padded = jnp.pad(x, (0, -x.size % size)).reshape(-1, size)
    out = jax.lax.map(function, padded)
    return out.reshape(-1, *out.shape[2:])[: x.size]
