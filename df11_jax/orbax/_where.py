"""Where leaves go: the arrays that are read, and the weights that they are decompressed to."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from df11_jax._array import is_df11
from df11_jax._shards import payload_sharding
from df11_jax.orbax import _shardings
from df11_jax.orbax._plan import Conversion, LeafPlan


def of_arrays(plan: LeafPlan) -> list[Sharding | None]:
    """The shardings that the arrays of a leaf are to get; None for arrays on the host."""
    leaf, target = plan.leaf, plan.target
    texts = leaf.shardings
    if plan.conversion is Conversion.DECOMPRESS:
        # To be decoded there, if the leaf is divided like that.
        assert leaf.layout is not None, "the leaf is compressed"
        where = of_weights(plan)
        if isinstance(where, (NamedSharding, SingleDeviceSharding)):
            return [payload_sharding(leaf.layout, len(leaf.shape), where)] * len(texts)
    if plan.conversion is not Conversion.NONE:
        return [None] * len(texts)
    if leaf.layout and is_df11(target):
        wanted = [sharding_of(array) for array in target.payload]
    else:
        where = None if is_df11(target) else sharding_of(target)
        if leaf.layout and where is not None:
            where = payload_sharding(leaf.layout, len(leaf.shape), where)
        wanted = [where] * len(texts)
    destinations = []
    for text, part, sharding in zip(texts, leaf.parts, wanted, strict=True):
        if sharding is None and text is not None:
            sharding = _shardings.from_text(text, part.shape)
        elif sharding is None and leaf.is_compressed:
            sharding = _shardings.default()
        destinations.append(sharding)
    return destinations


def of_weights(plan: LeafPlan) -> Sharding | None:
    """The sharding that the weights of a compressed leaf are to get: the target's, or the stored.

    None if neither is known, because the leaf was saved from the host: then they go to the default
    device, as what was never placed does.
    """
    leaf, target = plan.leaf, plan.target
    where = sharding_of(target)
    if where is not None and not is_df11(target):
        return where
    ndim = len(leaf.parts[0].shape) if where is None else target.header.ndim
    if where is None and leaf.shardings[0] is not None:
        where = _shardings.from_text(leaf.shardings[0], leaf.parts[0].shape)
    if not isinstance(where, NamedSharding):
        return where
    # The last axis of the arrays counts words, and is none of the tensor.
    return where.update(spec=PartitionSpec(*where.spec[: ndim - 1]))


def sharding_of(target: Any) -> Sharding | None:
    """The sharding of a leaf of the target; None if it has none."""
    return getattr(target, "sharding", None)


def place(array: Any, sharding: Sharding | None) -> Any:
    """The array with this sharding; unchanged if that is None.

    If jax lacks its type, as it lacks 64-bit integers by default, it stays on the host.
    """
    is_placed = isinstance(array, jax.Array)
    if sharding is None or (is_placed and array.sharding == sharding):
        return array
    # `device_put` would keep half of the bits.
    if not is_placed and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    if sharding.is_fully_addressable or (is_placed and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
