"""Arrays on the host: how they come there, and how their memory is seen."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_ALIGNMENT = 64  # jax on a CPU takes aligned memory over instead of copying it


def to_host(array: Any) -> np.ndarray:
    """The elements of an array on the host.

    Those of an array on another device are gone when the caller drops them; those of an array on
    a CPU are not copied.

    Args:
        array: a numpy array, or a JAX array with all its shards on devices of this process.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    # From a new array of the same buffers: what comes to the host from another device is cached
    # with the array that was asked for it, and would stay as long as that does.
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The elements of an array as bytes in row-major order: a view, if it is contiguous.

    Unlike the array, it can always be written to a file: numpy exports neither bfloat16 nor arrays
    of no elements as buffers.
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def empty_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """`numpy.empty`, of memory that jax on a CPU takes over instead of copying it."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + nbytes].view(dtype).reshape(shape)


def cpu_device() -> jax.Device | None:
    """A CPU that JAX can use, if there is one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use accelerators only
        return None


def start_backends() -> None:
    """Starts JAX's backends, as the first use of a device does.

    Raises:
        RuntimeError: one of those that JAX was told to use is unknown or cannot be started, or none
            of them has a device.
    """
    try:
        jax.local_devices()
    except AssertionError:  # JAX says no more of an NVIDIA GPU that it does not see
        raise RuntimeError(
            f"JAX was told to use {jax.config.values['jax_platforms']} (JAX_PLATFORMS), and sees "
            "no such device here"
        ) from None


def default_device() -> jax.Device:
    """The device of arrays for which none is said, whatever mesh the caller has set."""
    # What is computed would be on all devices of the mesh.
    (device,) = jax.device_put(np.zeros((), np.uint8)).devices()
    return device
