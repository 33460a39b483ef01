"""Weights, their payloads and comparisons, for several tests."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax import _cpu_library
from df11_jax._array import DF11Array


def random_weights(shape: tuple[int, ...], seed: int = 0, scale: float = 0.02) -> jax.Array:
    """Bfloat16 weights as a network has them."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(scale * values, jnp.bfloat16)


def bits(weights: Any) -> np.ndarray:
    weights = np.asarray(weights)
    assert weights.dtype == jnp.bfloat16
    return weights.view(np.uint16)


def assert_same_bits(actual: Any, expected: Any) -> None:
    # numpy would compare a scalar with every element of an array.
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_array_equal(bits(actual), bits(expected))


def from_payload(payload: Any, slice_shape: tuple[int, ...]) -> DF11Array:
    return DF11Array(*map(jnp.asarray, payload), slice_shape=slice_shape)


def count_decodes(function: Callable[..., Any], *args: Any) -> int:
    """How many slices of tensors the CPU handler decodes during a call."""
    jax.block_until_ready(args)
    before = _cpu_library.decode_count()
    jax.block_until_ready(function(*args))
    return _cpu_library.decode_count() - before
