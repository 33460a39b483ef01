"""Rotary position embeddings."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from df11_jax.models._config import Rope


class Rotation(NamedTuple):
    """Sine and cosine of the angles by which heads are rotated."""

    sin: Float[Array, "batch seq half"]
    cos: Float[Array, "batch seq half"]


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position, for each pair of a head."""
    turning = 1 / rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        turning = turning / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_length * turning / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        weight = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        turning = (1 - weight) * turning / rope.factor + weight * turning
    return turning.astype(np.float32)


def rotation(positions: Int[Array, "batch seq"], rope: Rope, head_dim: int) -> Rotation:
    """The rotation at some positions."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, head_dim)
    return Rotation(jnp.sin(angles), jnp.cos(angles))


def rotate(
    x: Float[Array, "batch seq heads head_dim"], rotation: Rotation
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the pairs (i, i + half) of each head."""
    sin, cos = rotation.sin[:, :, None], rotation.cos[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
