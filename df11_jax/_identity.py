"""The identity of a leaf: leaves at several paths that have the same one are tied, one array."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from df11_jax._array import DF11Slice, is_df11


def identity(leaf: Any) -> Hashable:
    """What two leaves have in common if, and only if, they are the same weights in one memory.

    It tells leaves apart while they exist: a new array may get that of one that is gone.

    Args:
        leaf: a JAX array, traced or not; a numpy array; a compressed tensor, which is one with
            those of the same five arrays; slices of one, at the same index; or anything else, such
            as a shape, which is one with nothing.
    """
    if is_df11(leaf):
        return leaf.layout, *map(identity, leaf.payload)
    if isinstance(leaf, DF11Slice):
        return identity(leaf.stack), identity(leaf.index)
    if type(leaf) is np.ndarray:
        address, _ = leaf.__array_interface__["data"]
        return address, leaf.shape, leaf.strides, leaf.dtype
    if isinstance(leaf, jax.Array):
        return _jax_identity(leaf)
    return id(leaf) if isinstance(leaf, np.ndarray) else object()


def _jax_identity(array: jax.Array) -> Hashable:
    """The buffers of an array, where it has some: `jax.device_put` may make arrays that share."""
    if isinstance(array, jax.core.Tracer) or array.is_deleted() or not array.is_fully_addressable:
        return id(array)
    try:
        buffers = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    except (AttributeError, ValueError, RuntimeError):  # keys, and memory without addresses
        return id(array)
    return array.sharding, array.shape, array.dtype, *buffers
