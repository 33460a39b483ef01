"""Where devices that share a decoder have to know of each other. Without an axis, there is one.

What they exchange is exact but for the order of summation: products of a share are summed in
float32, and rounded once. All devices choose tokens from the same bits, gathered from those that
computed them: loops that end with the last token end for all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from df11_jax.models import _table
from df11_jax.models._table import Table


def summed(axis: str | None) -> Callable[..., Array] | None:
    """The `dot_general` of layers of which each device has some of the inputs; None for any."""
    if axis is None:
        return None

    def dot_general(x: Array, kernel: Array, dimensions: Any, precision: Any = None) -> Array:
        products = jax.lax.dot_general(
            x, kernel, dimensions, precision, preferred_element_type=jnp.float32
        )
        return jax.lax.psum(products, axis).astype(x.dtype)

    return dot_general


def look_up(
    table: Table, tokens: Int[Array, "*batch"], axis: str | None
) -> BFloat16[Array, "*batch dim"]:
    """`_table.look_up` in a table of which each device has some groups of rows."""
    if axis is None:
        return _table.look_up(table, tokens)
    groups, rows, _ = table.shape
    local = tokens - jax.lax.axis_index(axis) * (groups * rows)
    is_here = (local >= 0) & (local < groups * rows)
    found = _table.look_up(table, jnp.where(is_here, local, 0))
    # As integers: the sum of zeros and a negative zero would be a positive one.
    bits = jax.lax.bitcast_convert_type(found, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.psum(jnp.where(is_here[..., None], bits, 0), axis)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), found.dtype)


def project(
    table: Table, x: Float[Array, "*batch dim"], axis: str | None
) -> Float[Array, "*batch rows_of_all"]:
    """`_table.project` with a table of which each device has some groups of rows."""
    logits = _table.project(table, x)
    if axis is None:
        return logits
    return jax.lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True)
