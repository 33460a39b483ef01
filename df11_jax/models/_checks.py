"""Checks of tokens and their places, with which a text model would else compute something else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax.models import _cache
from df11_jax.models._cache import Cache
from df11_jax.models._config import Config


def check_tokens(
    tokens: Any, positions: Any, slot: Any, keep: Any, cache: Cache, config: Config
) -> None:
    """Checks arguments of `forward`; of JAX arrays, the shapes alone.

    Raises:
        ValueError: they do not fit each other, or the cache.
    """
    if np.ndim(tokens) != 2:
        raise ValueError(f"tokens have the shape {np.shape(tokens)}, expected [batch, seq]")
    if np.shape(positions) != np.shape(tokens):
        # Those of one row for all would mix up the queries of the rows.
        raise ValueError(
            f"positions have the shape {np.shape(positions)}, expected {np.shape(tokens)}, that of "
            "the tokens"
        )
    for name, number in (("slot", slot), ("keep", keep)):
        if np.shape(number):
            raise ValueError(
                f"{name} has the shape {np.shape(number)}, expected one number: that of all rows"
            )
    seq, room = np.shape(tokens)[1], _cache.capacity(cache, config)
    if not isinstance(slot, jax.Array) and not 0 <= slot <= room - seq:
        raise ValueError(
            f"slot is {slot}, and {seq} tokens come, but the cache has room for {room}"
        )
    if keep is not None and not isinstance(keep, jax.Array) and not 0 <= keep <= seq:
        raise ValueError(f"keep is {keep}, but {seq} tokens come")
    if not isinstance(positions, jax.Array) and np.size(positions):
        least, most = np.min(positions), np.max(positions)
        if not 0 <= least <= most <= _cache.NOWHERE:  # all tokens would attend to a negative one
            raise ValueError(
                f"positions are {least} to {most}, expected 0 or more, and {_cache.NOWHERE}, the "
                "largest int32, for tokens that only pad a row"
            )


def check_rows(prompts: Any, lengths: Any, keys: Any, length: int) -> None:
    """Checks arguments of `prefill`: their shapes and dtypes alone, since it is compiled.

    Raises:
        TypeError: the prompts are no array of integers.
        ValueError: shapes do not fit each other, or the cache.
    """
    if not hasattr(prompts, "dtype") or not jnp.issubdtype(prompts.dtype, jnp.integer):
        kind = getattr(prompts, "dtype", type(prompts).__name__)
        raise TypeError(f"prompts are {kind}, expected an array [batch, seq] of integers")
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(
            f"prompts have the shape {prompts.shape}, expected [batch, seq], at least one of each"
        )
    batch, seq = prompts.shape
    if seq > length:
        raise ValueError(f"prompts have {seq} tokens, but the cache has room for {length}")
    # Keys as `jax.random.PRNGKey` makes them have an axis of their own behind.
    for name, shape in (("lengths", np.shape(lengths)), ("keys", np.shape(keys)[:1])):
        if shape != (batch,):
            raise ValueError(
                f"{name} have the shape {shape}, expected {(batch,)}: one for each prompt"
            )
