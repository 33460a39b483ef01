"""Rotary position embeddings."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from df11_jax.models._config import Rope


class Rotation(NamedTuple):
    """Sine and cosine of the angles by which heads are rotated, times the attention factor."""

    sin: Float[Array, "batch seq pairs"]
    cos: Float[Array, "batch seq pairs"]


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """The number of elements of a head that are rotated, its first ones."""
    return head_dim if rope.kind == "proportional" else int(head_dim * rope.fraction)


def frequencies(rope: Rope, head_dim: int, length: int = 0) -> Float[np.ndarray, " pairs"]:
    """Radians per position, for each pair of a head.

    Args:
        rope: the parameters of the embedding.
        head_dim: the size of a head.
        length: the length of the cache, on which the frequencies of "longrope" depend.
    """
    size = rotary_dim(rope, head_dim)
    turning = 1 / rope.theta ** (np.arange(0, size, 2) / size)
    if rope.kind in ("linear", "proportional"):
        turning = turning / rope.factor
        if rope.kind == "proportional":
            turning[int(rope.fraction * head_dim // 2) :] = 0
    elif rope.kind == "longrope":
        is_long = length > rope.original_length
        turning = turning / np.array(rope.long_factors if is_long else rope.short_factors)
    elif rope.kind in ("llama3", "yarn"):
        weight = (
            _llama3_weights(turning, rope) if rope.kind == "llama3" else _yarn_weights(rope, size)
        )
        turning = (1 - weight) * turning / rope.factor + weight * turning
    return turning.astype(np.float32)


def _llama3_weights(turning: np.ndarray, rope: Rope) -> np.ndarray:
    """The weights of unchanged frequencies, by the number of turns."""
    turns = rope.original_length * turning / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    return np.clip((turns - rope.low_freq_factor) / span, 0, 1)


def _yarn_weights(rope: Rope, size: int) -> np.ndarray:
    """The weights of unchanged frequencies, by the index of the pair."""

    def pair(turns: float) -> float:
        """The index of the pair, not rounded, that makes so many turns."""
        ratio = rope.original_length / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(rope.theta))

    first = max(math.floor(pair(rope.high_freq_factor)), 0)
    last = min(math.ceil(pair(rope.low_freq_factor)), size - 1)
    return 1 - np.clip((np.arange(size // 2) - first) / max(last - first, 1e-3), 0, 1)


def rotation(
    positions: Int[Array, "batch seq"], rope: Rope, head_dim: int, length: int
) -> Rotation:
    """The rotation at some positions, with a cache of some length."""
    turning = frequencies(rope, head_dim, length)
    angles = positions[..., None].astype(jnp.float32) * turning
    return Rotation(
        jnp.sin(angles) * rope.attention_factor, jnp.cos(angles) * rope.attention_factor
    )


def rotate(
    x: Float[Array, "batch seq heads head_dim"], rotation: Rotation, rope: Rope
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the pairs of each head."""
    sin, cos = rotation.sin[:, :, None], rotation.cos[:, :, None]
    size = rotary_dim(rope, x.shape[-1])
    wide = x[..., :size].astype(jnp.float32)
    if rope.interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    if rope.interleaved:
        turned = jnp.stack(parts, axis=-1).reshape(wide.shape)
    else:
        turned = jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., size:]], axis=-1)


def grow_queries(
    query: Float[Array, "batch seq heads head_dim"], positions: Int[Array, "batch seq"], rope: Rope
) -> Float[Array, "batch seq heads head_dim"]:
    """Queries multiplied by a number that grows with their positions."""
    if not rope.query_growth:
        return query
    times = (positions // rope.original_length).astype(jnp.float32)
    scale = 1 + rope.query_growth * jnp.log1p(times)
    return query * scale[..., None, None].astype(query.dtype)
