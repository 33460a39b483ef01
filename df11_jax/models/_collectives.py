"""Exchange between devices that compute a transformer together; without an axis there is only one.

The exchange is exact but for the order of summation: the products of the shards are summed in
float32, and rounded once. All devices choose tokens from the same bits, gathered from the devices
that computed them, so loops that end with the last token end on all devices together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Int

from df11_jax.models import tables
from df11_jax.models._sharding import ALL_AXES
from df11_jax.models.tables import Table


def summing_dot_general(axis: str | None) -> Callable[..., Array] | None:
    """The `dot_general` of a layer whose inputs are divided; None, for the usual one, if not."""
    if axis is None:
        return None

    def dot_general(x: Array, kernel: Array, dimensions: Any, precision: Any = None) -> Array:
        products = jax.lax.dot_general(
            x, kernel, dimensions, precision, preferred_element_type=jnp.float32
        )
        return jax.lax.psum(products, axis).astype(x.dtype)

    return dot_general


def sum_up(terms: Float[Array, "*batch"], axis: str | None) -> Float[Array, "*batch"]:
    """The sum of what each device has computed; without an axis, the term of the only one."""
    return terms if axis is None else jax.lax.psum(terms, axis)


def look_up(
    table: Table, tokens: Int[Array, "*batch"], divided: bool
) -> BFloat16[Array, "*batch dim"]:
    """`tables.look_up` in a table that may be divided over all devices."""
    if not divided:
        return tables.look_up(table, tokens)
    rows = table.shape[1]
    local = tokens - jax.lax.axis_index(ALL_AXES) * rows
    is_here = (local >= 0) & (local < rows)
    found = tables.look_up(table, jnp.where(is_here, local, 0))
    return spread(found, is_here[..., None], ALL_AXES)


def spread(
    x: Float[Array, "*batch"], is_here: Bool[Array, "*batch"], axes: str | tuple[str, ...]
) -> Float[Array, "*batch"]:
    """Gives all devices along some axes what one of them has of each element, bit for bit."""
    # As integers: the sum of zeros and a negative zero would be a positive one.
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    bits = jax.lax.psum(jnp.where(is_here, bits, 0), axes)
    return jax.lax.bitcast_convert_type(bits.astype(f"uint{width}"), x.dtype)


def project(
    table: Table, x: Float[Array, "*batch dim"], divided: bool, fuse: bool
) -> Float[Array, "*batch rows_of_all"]:
    """`tables.project` with a table that may be divided over all devices."""
    logits = tables.project(table, x, fuse)
    if not divided:
        return logits
    return jax.lax.all_gather(logits, ALL_AXES, axis=logits.ndim - 1, tiled=True)
