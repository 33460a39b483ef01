"""Weights, their payloads and comparisons, for several tests."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from df11_jax import _cpu_library, _layout
from df11_jax._array import DF11Array

_MATRIX = ("batch_axes", "row_axes", "along_columns")


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


def check_leaves_without_elements(leaf: Any, save: Callable[[Any], None]) -> None:
    """Checks that `save`, which saves a leaf as `a/b`, refuses its shape, tracers and deleted ones.

    Args:
        leaf: a plain or compressed leaf, whose arrays are deleted.
        save: saves the leaf that it is given.
    """

    def check(leaf: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"^a/b: {message}"):
            save(leaf)

    check(jax.eval_shape(lambda: leaf), "expected an array, got a ShapeDtypeStruct")
    jax.jit(lambda traced: check(traced, "is traced"))(leaf)
    for array in jax.tree.leaves(leaf):
        array.delete()
    check(leaf, "was deleted")


def from_payload(payload: Any, slice_shape: tuple[int, ...], **cut: Any) -> DF11Array:
    """A leaf of arrays that `reference_encoder` made with the options `cut`."""
    layout = dataclasses.replace(
        _layout.make_layout(slice_shape, **{k: v for k, v in cut.items() if k in _MATRIX}),
        steps=cut.get("steps", _layout.MAX_STEPS),
        code_bits=cut.get("code_bits", _layout.MAX_CODE_BITS),
    )
    return DF11Array.from_payload(map(jnp.asarray, payload), layout)


def count_decodes(function: Callable[..., Any], *args: Any) -> int:
    """How many slices of tensors the CPU handler decodes during a call."""
    jax.block_until_ready(args)
    before = -1
    while before != (before := _cpu_library.decode_count()):
        time.sleep(0.05)  # what others have started, and did not wait for, may still run
    jax.block_until_ready(function(*args))
    return _cpu_library.decode_count() - before


def stored_sizes(function: Callable[[jax.Array], Any], x: jax.Array) -> list[int]:
    """Of the arrays that a backward pass needs of the forward pass; not of payloads, in uint32."""
    pullback = jax.eval_shape(lambda x: jax.vjp(function, x)[1], x)
    return [leaf.size for leaf in jax.tree.leaves(pullback) if leaf.dtype != jnp.uint32]
