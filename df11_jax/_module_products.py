"""Products and look-ups in other libraries' modules, which read their weights as arrays.

An array that was read from a compressed tensor (`_reads.py`) is known again, and multiplied by
`dot`, or looked up by `take`. What decompressed it then has no use, and XLA takes it out of the
program.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from df11_jax._product import FUSED_TYPES, can_fuse, dot
from df11_jax._reads import source_of, stack_of
from df11_jax._slices import is_split
from df11_jax._take import has_bands, take


def dot_general(
    x: Array, weights: Array, dimension_numbers: Any, *args: Any, **options: Any
) -> Array:
    """`jax.lax.dot_general`, fused where `fused` can."""
    y = fused(x, weights, dimension_numbers, *args, **options)
    if y is None:
        return jax.lax.dot_general(x, weights, dimension_numbers, *args, **options)
    return y


def einsum(subscripts: str, x: Array, weights: Array, **options: Any) -> Array:
    """`jax.numpy.einsum` of two operands, fused where `fused_einsum` can."""
    y = fused_einsum(subscripts, x, weights, **options)
    return jnp.einsum(subscripts, x, weights, **options) if y is None else y


def fused(
    x: Array,
    weights: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> Array | None:
    """`jax.lax.dot_general` of bfloat16 rows and a compressed matrix, by `dot`.

    Args:
        x: the rows to multiply.
        weights: an array that was read from a compressed tensor.
        dimension_numbers: see `jax.lax.dot_general`.
        precision: likewise. It changes nothing: products are exact, and their sums in float32.
        preferred_element_type: likewise.
        out_sharding: likewise.

    Returns:
        The product; None if it cannot be fused: if nothing compressed was read, or what was is no
        matrix whose rows are summed up, or is sharded, or x is by its type; if there are batch
        axes, more rows than `dot` fuses, or other types; or if axes that are summed up differ in
        length, which is an error that JAX raises.
    """
    compressed = source_of(weights)
    if compressed is None or out_sharding is not None or is_split(x):
        return None
    stack: Any = stack_of(compressed)
    (x_axes, axes), (batch_axes, _) = dimension_numbers
    out_dtype = preferred_element_type or x.dtype
    free = [axis for axis in range(x.ndim) if axis not in x_axes]
    rows = [x.shape[axis] for axis in free]
    layout = stack.layout
    if (
        batch_axes
        or x.dtype != jnp.bfloat16
        or out_dtype not in FUSED_TYPES
        or weights.ndim != len(layout.shape)
        or matrix_axes(axes, weights.ndim)
        != (layout.batch_axes, layout.row_axes, layout.along_columns)
        or [x.shape[axis] for axis in x_axes] != [weights.shape[axis] for axis in axes]
        or not can_fuse(stack, math.prod(rows))
    ):
        return None
    in_order = [x_axis for _, x_axis in sorted(zip(axes, x_axes, strict=True))]
    x = x.transpose(*free, *in_order).reshape(*rows, -1)
    y = dot(x, compressed, preferred_element_type=out_dtype)
    return y.reshape(*rows, *(weights.shape[i] for i in range(weights.ndim) if i not in axes))


def rows(weights: Array, indices: Array) -> Array | None:
    """`jax.numpy.take` of rows of an array that was read from a compressed matrix, by `take`.

    Returns:
        The rows; None if all of the matrix would be decompressed.
    """
    compressed = source_of(weights)
    if compressed is None or is_split(indices) or not has_bands(stack_of(compressed)):
        return None
    return take(compressed, indices)


def fused_einsum(subscripts: str, x: Array, weights: Array, **options: Any) -> Array | None:
    """`jax.numpy.einsum` of two operands, by `fused`; None if it cannot be fused."""
    found = contraction(subscripts)
    if found is None or (x.ndim, weights.ndim) != (found.x_ndim, found.ndim):
        return None
    y = fused(x, weights, ((found.x_axes, found.axes), ((), ())), **options)
    return None if y is None else y.transpose(found.order)


class Contraction(NamedTuple):
    """A product of matrices that is written as an einsum of x and weights.

    Attributes:
        x_axes: the axes of x that are summed up.
        axes: those of the weights, in the same order.
        order: the axes of the result, in what `jax.lax.dot_general` returns.
        x_ndim: the number of axes of x.
        ndim: that of the weights.
    """

    x_axes: list[int]
    axes: list[int]
    order: list[int]
    x_ndim: int
    ndim: int


def contraction(subscripts: str) -> Contraction | None:
    """What an einsum sums up; None if it is no product of two matrices, or has an ellipsis."""
    match = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]*)", subscripts.replace(" ", ""))
    if match is None:
        return None
    first, second, result = match.groups()
    summed = [label for label in second if label in first and label not in result]
    free = [label for label in first + second if label not in summed]
    has_each_once = all(len(set(labels)) == len(labels) for labels in (first, second))
    if not has_each_once or sorted(free) != sorted(result):
        return None
    x_axes, axes = ([labels.index(label) for label in summed] for labels in (first, second))
    order = [free.index(label) for label in result]
    return Contraction(x_axes, axes, order, len(first), len(second))


def matrix_axes(summed: Sequence[int], ndim: int) -> tuple[int, int, bool] | None:
    """How weights are compressed for products that sum up some of their axes.

    Args:
        summed: these axes.
        ndim: the number of the weights' axes.

    Returns:
        The arguments `batch_axes`, `row_axes` and `along_columns` of `compress`; None if there are
        none for it, because the axes are not next to each other, or all that there are.
    """
    count, first = len(summed), min(summed, default=0)
    if not 0 < count < ndim or sorted(summed) != list(range(first, first + count)):
        return None
    return (0, first, True) if first + count == ndim else (first, count, False)
