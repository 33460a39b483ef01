"""The shapes of compressed stacks of any size, to compile programs without weights."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from df11_jax import DF11Array, _layout
from df11_jax._layout import Layout

# Of normally distributed weights; trained ones have some more.
EXPONENT_BITS = 2.63


def compressed_stack(stack_shape: Sequence[int], layout: Layout, make_shape: Callable) -> DF11Array:
    """The shapes of a compressed stack, each made by `make_shape(shape, dtype)`."""
    view = layout.view
    words = (
        _layout.HEADER_WORDS,
        _layout.CODEBOOK_WORDS,
        view.chunks + 1,
        4 * math.ceil(view.size * EXPONENT_BITS / 128),
        view.sign_mantissa_words,
    )
    payload = [make_shape((*stack_shape, count), jnp.uint32) for count in words]
    return DF11Array.from_payload(payload, layout)
