"""Shardings as text, as Orbax writes them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from df11_jax._files.untrusted_json import parse_json
from df11_jax._host_arrays import default_device

_METADATA_TYPES: dict[str, Any] = {
    "NamedSharding": ocp.metadata.NamedShardingMetadata,
    "SingleDeviceSharding": ocp.metadata.SingleDeviceShardingMetadata,
}


@functools.lru_cache(1024)
def to_text(sharding: jax.sharding.Sharding) -> str:
    """The text that `from_text` reads; an empty one if Orbax cannot write this type of sharding."""
    metadata = _METADATA_TYPES.get(type(sharding).__name__)
    return metadata.from_jax_sharding(sharding).to_serialized_string() if metadata else ""


@functools.lru_cache(1024)
def from_text(text: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding that a text says.

    Args:
        text: the text.
        shape: the shape of the array that is to be sharded.

    Returns:
        The sharding; the default device if its devices do not exist, or the text is damaged.
    """
    sharding = _parse(text)
    try:
        jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)  # for as many axes
        sharding.shard_shape(shape)  # and divides them evenly
    except ValueError:
        return default()
    return sharding


@functools.lru_cache(1024)
def _parse(text: str) -> jax.sharding.Sharding:
    try:
        fields = parse_json(text.encode())
        metadata = _METADATA_TYPES[fields["sharding_type"]].from_deserialized_dict(fields)
        sharding = metadata.to_jax_sharding()
    except Exception:  # of any type: jax has some of its own
        return default()
    return sharding if _has_devices(sharding) else default()


def _has_devices(sharding: jax.sharding.Sharding) -> bool:
    # jax makes a mesh of anything, and XLA ends the process for one of no devices.
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return True
    devices = sharding.mesh.devices.ravel().tolist()
    are_devices = all(isinstance(device, jax.Device) for device in devices)
    return are_devices and 0 < len(devices) == len(set(devices))


def default() -> jax.sharding.Sharding:
    """The sharding of arrays on the default device, whatever mesh the caller has set."""
    return jax.sharding.SingleDeviceSharding(default_device())
