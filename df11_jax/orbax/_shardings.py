"""Shardings as text, as Orbax writes them."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

_KINDS: dict[str, Any] = {
    "NamedSharding": ocp.metadata.NamedShardingMetadata,
    "SingleDeviceSharding": ocp.metadata.SingleDeviceShardingMetadata,
}


@functools.lru_cache(1024)
def to_text(sharding: jax.sharding.Sharding) -> str:
    """What `from_text` reads; an empty text for the kinds of shardings that Orbax cannot write."""
    kind = _KINDS.get(type(sharding).__name__)
    return kind.from_jax_sharding(sharding).to_serialized_string() if kind else ""


@functools.lru_cache(1024)
def from_text(text: str) -> jax.sharding.Sharding:
    """The sharding; the default device if it cannot be had, because its devices are not there."""
    try:
        fields = json.loads(text)
        return _KINDS[fields["sharding_type"]].from_deserialized_dict(fields).to_jax_sharding()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return default()


def default() -> jax.sharding.Sharding:
    """The default device."""
    (device,) = jnp.zeros(()).devices()
    return jax.sharding.SingleDeviceSharding(device)
