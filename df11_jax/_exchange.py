"""What the processes that have some of several devices tell each other."""

from collections.abc import Collection

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt32


def gather(
    words: UInt32[np.ndarray, "*shape"], devices: Collection[jax.Device]
) -> dict[int, UInt32[np.ndarray, "*shape"]]:
    """What each of the processes passes that have some of the devices, by process.

    JAX's own `process_allgather` waits for all processes that there are, also those that have none
    of these devices, and wants as many devices of each.

    Args:
        words: what this process tells, of the same shape in all of them.
        devices: such as those of a sharding. All processes that have some, such as this one, call
            this.
    """
    first: dict[int, jax.Device] = {}
    for device in sorted(devices, key=lambda device: device.id):
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array(list(first.values())), ("process",))
    here = jax.device_put(words[None], first[jax.process_index()])
    told = jax.make_array_from_single_device_arrays(
        (len(first), *words.shape), NamedSharding(mesh, PartitionSpec("process")), [here]
    )
    with jax.set_mesh(mesh):  # whatever mesh the caller has set
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(told)
    return dict(zip(first, np.asarray(whole.addressable_data(0)), strict=True))
