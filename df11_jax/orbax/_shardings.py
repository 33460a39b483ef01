"""Shardings as text, as Orbax writes them."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

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
def from_text(text: str) -> jax.sharding.Sharding:
    """The sharding that a text says; the default device if that sharding's devices do not exist."""
    try:
        fields = json.loads(text)
        return (
            _METADATA_TYPES[fields["sharding_type"]]
            .from_deserialized_dict(fields)
            .to_jax_sharding()
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return default()


def default() -> jax.sharding.Sharding:
    """The sharding of arrays on the default device."""
    (device,) = jnp.zeros(()).devices()
    return jax.sharding.SingleDeviceSharding(device)
