"""Rotary position embeddings."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from df11_jax.models._config import Config, Rope


class Rotation(NamedTuple):
    """Sine and cosine of the angles by which heads are turned.

    `rotations` returns them for full and for sliding layers, along a leading axis.
    """

    sin: Float[Array, "*kinds batch seq half"]
    cos: Float[Array, "*kinds batch seq half"]

    def choose(self, sliding: Bool[Array, ""]) -> "Rotation":
        """Those for one layer."""
        if self.sin.shape[0] == 1:
            return Rotation(self.sin[0], self.cos[0])
        return Rotation(*(jnp.where(sliding, both[1], both[0]) for both in self))


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians a position, for each pair of a head."""
    turning = 1 / rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        turning = turning / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_length * turning / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        share = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        turning = (1 - share) * turning / rope.factor + share * turning
    return turning.astype(np.float32)


def rotations(positions: Int[Array, "batch seq"], config: Config) -> Rotation:
    """The rotations at some positions, one for each kind of layer that the model has."""
    ropes = [config.rope]
    if any(config.sliding) and config.local_rope != config.rope:
        ropes.append(config.local_rope)
    turning = np.stack([frequencies(rope, config.head_dim) for rope in ropes])
    angles = positions[..., None].astype(jnp.float32) * turning[:, None, None]
    return Rotation(jnp.sin(angles), jnp.cos(angles))


def rotate(
    x: Float[Array, "batch seq heads head_dim"], rotation: Rotation
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns the pairs (i, i + half) of each head."""
    sin, cos = rotation.sin[:, :, None], rotation.cos[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
