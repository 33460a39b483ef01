"""Bit patterns: as such, a cache keeps what later tokens need of some."""

import jax
import numpy as np
from jaxtyping import Array, Float, UInt
from numpy.typing import DTypeLike


def bits_dtype(dtype: DTypeLike) -> np.dtype:
    """The unsigned integers of the same size."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


@jax.custom_jvp
def to_bits(new: Float[Array, "*batch"]) -> UInt[Array, "*batch"]:
    """The bit patterns of what a cache keeps of some tokens.

    Raises:
        TypeError: it is differentiated. JAX would take integers for constants, and gradients would
            lack what comes through the cache.
    """
    return jax.lax.bitcast_convert_type(new, bits_dtype(new.dtype))


@to_bits.defjvp
def _to_bits_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    raise TypeError(
        "the blocks of a text model cannot be differentiated: their cache holds bit patterns, "
        "which have no derivatives. What comes after the blocks can, such as an output head"
    )
