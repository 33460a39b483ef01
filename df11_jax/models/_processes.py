"""Leaves over the devices of several processes, each of which has the shards of its own devices.

All processes load the same leaves in the same order: what they agree on for each, they exchange one
after the other.
"""

import zlib
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Shaped

from df11_jax._exchange import gather
from df11_jax._shards import parts_of
from df11_jax.models._sharding import DeviceOrSharding


def spans_processes(where: DeviceOrSharding) -> TypeGuard[NamedSharding]:
    """Whether an array there is on devices of other processes, too."""
    return isinstance(where, NamedSharding) and not where.is_fully_addressable


def put_shards(array: Shaped[np.ndarray, "..."], where: DeviceOrSharding) -> Array:
    """Puts what this process has of an array onto its devices.

    Args:
        array: the different shards of this process's devices, one after the other along the first
            axis, the only one that is divided.
        where: the device or sharding of the whole array.
    """
    if not spans_processes(where):
        return jax.device_put(array, where)
    # JAX finds the shape of the whole array by itself only if all processes have as much of it.
    (count,) = parts_of(where, 1)
    indices = where.devices_indices_map((count,))
    here = {indices[device][0].start for device in where.addressable_devices}
    shape = (array.shape[0] // len(here) * count, *array.shape[1:])
    return jax.make_array_from_process_local_data(where, array, shape)


def find_longest(words: int, where: DeviceOrSharding) -> int:
    """The largest of the numbers that the processes of an array have."""
    if not spans_processes(where):
        return words
    return int(max(gather(np.array(words, np.uint32), where.device_set).values()))


def check_same(what: Any, where: DeviceOrSharding) -> None:
    """Checks that all processes are about to load the same; otherwise they would wait for ever.

    Args:
        what: that which has to be the same, with a `repr` that tells.
        where: the device or sharding of what they load.

    Raises:
        ValueError: something differs.
    """
    if not spans_processes(where):
        return
    digests = gather(np.array(zlib.crc32(repr(what).encode()), np.uint32), where.device_set)
    first = min(digests)
    if other := [process for process in sorted(digests) if digests[process] != digests[first]]:
        raise ValueError(
            f"processes {other} load another model, or with other arguments, than process {first}: "
            "all need the same files and the same arguments"
        )
