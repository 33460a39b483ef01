"""Compression of tensors that lie on a mesh, shard by shard: each device keeps its share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from df11_jax._array import DF11Array
from df11_jax._exchange import gather
from df11_jax._host_arrays import to_host
from df11_jax._host_codec import encode
from df11_jax._layout import Layout, make_layout


class Shards(NamedTuple):
    """A tensor that is to lie on a mesh, or what this process has of it.

    Attributes:
        shape: the shape of the whole tensor.
        sharding: how it is divided.
        shards: different shards, and the devices that have each.
        to_weights: brings a shard, on the host, into the form in which it is encoded.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding
    shards: Sequence[tuple[Any, list[jax.Device]]]
    to_weights: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(
        cls,
        array: Any,
        sharding: NamedSharding,
        axis: int,
        to_weights: Callable[[np.ndarray], np.ndarray],
    ) -> Self:
        """The shards of an array.

        Args:
            array: an array of numpy or JAX. Unless it is sharded so already, or over several
                processes, it is taken to the host, and cut there.
            sharding: how it is to be sharded.
            axis: the axis that `to_weights` brings to the front.
            to_weights: see `Shards`.
        """
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = jax.device_put(array, sharding)
        if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
            pieces = [(shard.index, shard.device, shard.data) for shard in array.addressable_shards]
        else:
            host = to_host(array)
            # These raise ValueError: for more axes than there are, and where parts are uneven.
            parts_of(sharding, host.ndim)
            sharding.shard_shape(host.shape)
            indices = sharding.addressable_devices_indices_map(host.shape)
            pieces = [(index, device, host[index]) for device, index in indices.items()]
        shards: dict[Any, tuple[Any, list[jax.Device]]] = {}
        for index, device, piece in pieces:
            key = tuple((part.start, part.stop) for part in index)
            shards.setdefault(key, (piece, []))[1].append(device)
        shape, spec = list(array.shape), list(sharding.spec)
        spec += [None] * (len(shape) - len(spec))
        for dims in (shape, spec):
            dims[:0] = [dims.pop(axis)] if axis else []
        sharding = sharding.update(spec=PartitionSpec(*spec))
        return cls(tuple(shape), sharding, list(shards.values()), to_weights)

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of shards along each axis."""
        return parts_of(self.sharding, len(self.shape))


def parts_of(sharding: NamedSharding, ndim: int) -> tuple[int, ...]:
    """The number of shards along each axis of an array.

    Args:
        sharding: how it is sharded.
        ndim: the number of its axes.
    """
    spec = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    if len(spec) > ndim:
        raise ValueError(f"{sharding.spec} has {len(spec)} axes, and the tensor {ndim}")
    spec += [(None,)] * (ndim - len(spec))
    sizes = sharding.mesh.shape
    return tuple(math.prod(sizes[name] for name in axes if name is not None) for axes in spec)


def placements(shardings: PyTree, treedef: Any) -> list[Any]:
    """A sharding or device for each leaf of a tree, as `jax.device_put` takes them.

    Args:
        shardings: one, or a tree of them that may end before the other one does; None for leaves
            that stay where they are.
        treedef: the other tree.

    Raises:
        ValueError: it is a tree of another kind.
    """
    stays = object()  # in the place of None, which is a tree of no leaves
    said = jax.tree.map(lambda x: stays if x is None else x, shardings, is_leaf=lambda x: x is None)
    try:
        wide = jax.tree.broadcast(said, jax.tree.unflatten(treedef, range(treedef.num_leaves)))
    except ValueError as error:
        raise ValueError(
            "the tree of shardings does not fit that of the arrays: it may end before that does "
            f"(a sharding or None there is for all below), and has all its keys. {error}"
        ) from None
    return [None if where is stays else _on_set_mesh(where) for where in jax.tree.leaves(wide)]


def _on_set_mesh(where: Any) -> Any:
    """A PartitionSpec on the mesh that is set, as `jax.device_put` takes it; all else as it is."""
    if isinstance(where, PartitionSpec) and not (mesh := jax.sharding.get_mesh()).empty:
        return NamedSharding(mesh, where)
    return where


def encode_shards(tensor: Shards, name: str, layout: Layout, **options: Any) -> DF11Array:
    """Compresses a tensor where it lies.

    Args:
        tensor: the tensor.
        name: its name, for messages.
        layout: the layout of its slices, which are divided as the tensor is.
        options: those of `encode`.

    Returns:
        The compressed tensor, whose arrays are sharded by the PartitionSpec of the tensor.

    Raises:
        ValueError: the slices are divided otherwise.
        RuntimeError: verification failed.
    """
    stack_axes = len(tensor.shape) - len(layout.shape)
    is_whole = not layout.parts and math.prod(tensor.parts[stack_axes:]) == 1
    if layout.parts != tensor.parts[stack_axes:] and not is_whole:
        raise ValueError(
            f"{name}: is sharded into {list(tensor.parts[stack_axes:])} parts by "
            f"{tensor.sharding.spec}, expected {list(layout.parts) or 'a tensor on one device'}: "
            "place it likewise first (jax.device_put), or compress without like"
        )
    one_part = (1,) * len(layout.parts)
    payloads = [
        encode(tensor.to_weights(to_host(shard)), name, layout, parts=one_part, **options)
        for shard, _ in tensor.shards
    ]
    leading = tensor.shape[:stack_axes] + layout.parts
    spec = tensor.sharding.spec[: len(leading)]
    sharding = tensor.sharding.update(spec=PartitionSpec(*spec))

    def place(pieces: Sequence[np.ndarray], words: int) -> jax.Array:
        on_devices = []
        for piece, (_, devices) in zip(pieces, tensor.shards, strict=True):
            room = [(0, 0)] * (piece.ndim - 1) + [(0, words - piece.shape[-1])]
            padded = np.pad(piece, room) if room[-1][1] else piece
            for device in devices:
                where = SingleDeviceSharding(device, memory_kind=tensor.sharding.memory_kind)
                on_devices.append(jax.device_put(padded, where))
        return jax.make_array_from_single_device_arrays((*leading, words), sharding, on_devices)

    # All parts have arrays of the same shapes, wherever they are.
    lengths = [[part.shape[-1] for part in payload] for payload in payloads]
    longest = np.array(lengths, np.uint32).max(axis=0)
    if not tensor.sharding.is_fully_addressable:
        longest = np.max(list(gather(longest, tensor.sharding.device_set).values()), axis=0)
    arrays = zip(*payloads, strict=True)
    return DF11Array.from_payload(map(place, arrays, longest.tolist()), layout)


def payload_sharding(layout: Layout, ndim: int, where: Any) -> Any:
    """The sharding or device of the five arrays of a tensor, if that divides no part.

    Args:
        layout: the layout of its slices.
        ndim: the number of axes of the tensor, those of a stack included.
        where: the sharding that the tensor is to have, or its device.

    Returns:
        The sharding or device; None if parts would have to be divided.
    """
    if not isinstance(where, NamedSharding):
        return where
    if not any(where.spec):
        return where.update(spec=PartitionSpec())
    counts = parts_of(where, ndim)[ndim - len(layout.shape) :]
    if len(layout.parts) != len(counts):
        return None
    divides = any(n % m for n, m in zip(layout.parts, counts, strict=True))
    return None if divides else where


def divided_as(layout: Layout, ndim: int, where: NamedSharding) -> Layout:
    """The layout that a tensor gets on a mesh.

    Args:
        layout: the layout of its slices elsewhere.
        ndim: the number of axes of the tensor, those of a stack included.
        where: how the tensor is to be sharded.

    Raises:
        ValueError: it cannot be divided so.
    """
    return make_layout(
        layout.shape,
        batch_axes=layout.batch_axes,
        row_axes=layout.row_axes,
        along_columns=layout.along_columns,
        parts=parts_of(where, ndim)[ndim - len(layout.shape) :],
    )
