"""Divided slices: from a tensor to its parts, and back.

A slice is divided along its own axes, so that a part is what one device holds of a sharded tensor.
A program may have all parts of a slice, or (in a `jax.shard_map`, or a process of several) some
that lie next to each other: the shapes of its arrays tell how many.
"""

from collections.abc import Sequence
from typing import TypeVar

from jaxtyping import Array
from numpy import ndarray

from df11_jax._layout import Layout

AnyArray = TypeVar("AnyArray", Array, ndarray)


def divide(array: AnyArray, parts: Sequence[int]) -> AnyArray:
    """Cuts slices into their parts.

    Args:
        array: the slices, of the shape `batch + slice_shape`.
        parts: the number of parts along each axis of a slice; empty if it is not divided.

    Returns:
        The parts, of the shape `batch + parts + part_shape`.
    """
    batch = array.ndim - len(parts)
    shape = list(array.shape[:batch])
    for dim, n in zip(array.shape[batch:], parts, strict=True):
        shape += [n, dim // n]
    axes = range(batch, len(shape))
    order = list(range(batch)) + list(axes[::2]) + list(axes[1::2])
    return array.reshape(tuple(shape)).transpose(tuple(order))


def join(array: AnyArray, axes: int) -> AnyArray:
    """Puts slices together from their parts: the inverse of `divide`.

    Args:
        array: the parts, of the shape `batch + parts + part_shape`.
        axes: the number of axes of a slice.
    """
    batch = array.ndim - 2 * axes
    order, shape = list(range(batch)), list(array.shape[:batch])
    for i in range(batch, batch + axes):
        order += [i, i + axes]
        shape.append(array.shape[i] * array.shape[i + axes])
    return array.transpose(tuple(order)).reshape(tuple(shape))


def split_leading(shape: Sequence[int], layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The stack axes, and how many parts there are along each axis of a slice.

    Args:
        shape: the shape of one of the five arrays of a compressed tensor.
        layout: its layout.
    """
    end = len(shape) - 1
    begin = end - len(layout.parts)
    return tuple(shape[:begin]), tuple(shape[begin:end])


def shape_of(parts: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The shape of a slice of which there are so many parts."""
    if not layout.parts:
        return layout.shape
    return tuple(n * dim for n, dim in zip(parts, layout.part_shape, strict=True))
