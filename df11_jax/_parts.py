"""Divided slices: from a tensor to its parts, and back."""

from typing import TypeVar

from jaxtyping import Array
from numpy import ndarray

from df11_jax._layout import Layout

AnyArray = TypeVar("AnyArray", Array, ndarray)


def divide(array: AnyArray, layout: Layout) -> AnyArray:
    """Cuts slices into their parts.

    Args:
        array: the slices, of the shape `batch + layout.shape`.
        layout: the layout of a slice.

    Returns:
        The parts, of the shape `batch + layout.parts + layout.part_shape`.
    """
    if not layout.parts:
        return array
    batch = array.ndim - len(layout.shape)
    both = [n for pair in zip(layout.parts, layout.part_shape, strict=True) for n in pair]
    array = array.reshape(*array.shape[:batch], *both)
    return array.transpose(
        *range(batch), *range(batch, array.ndim, 2), *range(batch + 1, array.ndim, 2)
    )


def join(array: AnyArray, layout: Layout) -> AnyArray:
    """Puts slices together from their parts: the inverse of `divide`."""
    if not layout.parts:
        return array
    count = len(layout.parts)
    batch = array.ndim - 2 * count
    order = [axis for i in range(batch, batch + count) for axis in (i, i + count)]
    shape = array.shape[:batch]
    return array.transpose(*range(batch), *order).reshape(*shape, *layout.shape)
