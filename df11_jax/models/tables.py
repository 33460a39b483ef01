"""Embeddings and output heads, of which few rows are decompressed at a time.

A table [vocab, dim] is kept as [devices, rows, dim], the last rows being zeros: what each device
has of it, compressed as one matrix with pairs along columns. To look up a token, the 64 rows around
its own are decompressed; as an output head, tied or not, the matrix is multiplied by one fused
product, or decompressed piece by piece.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from df11_jax import _ffi
from df11_jax._array import DF11Array, DF11Slice
from df11_jax._decode import decompress
from df11_jax._layout import TILE_COLS, round_up
from df11_jax._product import can_fuse, dot
from df11_jax._take import has_bands, scan_pieces, take

# What one device has of a table.
Table = BFloat16[Array, "1 rows dim"] | DF11Array


def table_shape(vocab: int, dim: int, devices: int = 1) -> tuple[int, int, int]:
    """Shape of the table of a vocabulary, with as many whole bands on each device."""
    return devices, round_up(-(-vocab // devices), TILE_COLS), dim


def first_slice(table: Table) -> DF11Slice | BFloat16[Array, "rows dim"]:
    """All rows that a device has; a compressed table is not decompressed.

    Raises:
        ValueError: the table has the rows of several devices, of which these would be the first.
    """
    if table.shape[0] != 1:
        raise ValueError(
            f"params are divided for {table.shape[0]} devices, which compute together: prefill and "
            "decode need mesh=models.find_mesh(params), forward and project take those of one"
        )
    return DF11Slice(table, jnp.int32(0)) if isinstance(table, DF11Array) else table[0]


def look_up(table: Table, tokens: Int[Array, "*batch"]) -> BFloat16[Array, "*batch dim"]:
    """The rows of some tokens."""
    rows = first_slice(table)
    return take(rows, tokens) if isinstance(rows, DF11Slice) else rows[tokens]


def project(
    table: Table, x: Float[Array, "*batch dim"], fuse: bool = False
) -> Float[Array, "*batch rows"]:
    """Float32 products of `x` and all rows.

    Args:
        table: the table.
        x: what to multiply with.
        fuse: whether the product with a compressed table may be fused.
    """
    if (
        fuse
        and isinstance(table, DF11Array)
        and table.layout.along_columns  # else `dot` would multiply by the transpose
        and can_fuse(table, math.prod(x.shape[:-1]))
    ):
        # Elsewhere, all of it would be decompressed at once.
        compiled = dict.fromkeys(_ffi.product_platforms(), _project_fused)
        return jax.lax.platform_dependent(table, x, **compiled, default=_project_in_pieces)
    return _project_in_pieces(table, x)


def _project_fused(table: DF11Array, x: Array) -> Array:
    return dot(x, first_slice(table), preferred_element_type=jnp.float32)


def _project_in_pieces(table: Table, x: Array) -> Array:
    if isinstance(table, DF11Array) and not has_bands(table):  # not as `load_params` returns it
        table = decompress(table)

    # Plain ones, too: XLA may compute other bits with matrices of other shapes.
    def add(logits: Array, first: Int[Array, ""], piece: Array) -> Array:
        products = jnp.einsum(
            "...d,vd->...v", x, piece.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice_in_dim(logits, products, first, axis=-1)

    logits = jnp.zeros((*x.shape[:-1], table.shape[1]), jnp.float32)
    return scan_pieces(first_slice(table), logits, add, after=x)
