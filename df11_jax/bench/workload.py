"""Compressed weights to measure with: drawn on the device, and verified on it."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool

from df11_jax._array import DF11Array
from df11_jax._compress_tensor import compress
from df11_jax._slices import decode_slices

SIGMA = 0.02

# Of a weight of that distribution, about.
COMPRESSED_BYTES = 10.6 / 8

# What is read and written must not stay in a cache from one time to the next: no device has one of
# half that size.
_CACHE_BYTES = 256 * 2**20
# Calls of one program: for small tensors, enough to be timed.
_MOST_SLICES = 128


@dataclasses.dataclass(frozen=True)
class Workload:
    """Equally shaped stacks of slices, which are decoded one slice of each at a time.

    Attributes:
        name: the name of the workload in tables.
        arrays: one stack for each matrix.
    """

    name: str
    arrays: tuple[DF11Array, ...]

    @property
    def slices(self) -> int:
        """The number of slices of each stack."""
        return self.arrays[0].stack_shape[0]

    @property
    def weights(self) -> int:
        """The number of weights that one decode gives."""
        return sum(math.prod(array.slice_shape) for array in self.arrays)

    @property
    def compressed_bytes(self) -> float:
        """The bytes that one decode reads."""
        return sum(array.compressed_nbytes for array in self.arrays) / self.slices

    @property
    def bits_per_weight(self) -> float:
        """The bits of each compressed weight, everything included."""
        return 8 * self.compressed_bytes / self.weights

    @property
    def code_bits(self) -> int:
        """The bits of the longest code."""
        return max(array.layout.code_bits for array in self.arrays)

    @property
    def moved_bytes(self) -> float:
        """The bytes that one decode reads and writes."""
        return self.compressed_bytes + 2 * self.weights


def slices_beyond_cache(weights: int, bytes_per_weight: float = 2 + COMPRESSED_BYTES) -> int:
    """The number of slices of that size that take more memory than a cache has.

    Args:
        weights: the number of weights of a slice.
        bytes_per_weight: the bytes of each that are read and written; by default, its compressed
            bits and the bfloat16 that is decoded.
    """
    return min(_MOST_SLICES, math.ceil(_CACHE_BYTES / (weights * bytes_per_weight)))


@functools.partial(jax.jit, static_argnames="shape")
def draw(key: Array, shape: tuple[int, ...]) -> BFloat16[Array, "..."]:
    """Weights as a network has them: normal(0, 0.02)."""
    # In float32: bfloat16 draws would have few exponents.
    return (SIGMA * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def make_workload(name: str, matrices: Mapping[str, tuple[int, ...]], slices: int) -> Workload:
    """Draws, compresses and verifies a workload.

    Args:
        name: the name of the workload.
        matrices: the name and the shape of each matrix.
        slices: the number of slices of each matrix, all different.

    Returns:
        The workload, on the default device.

    Raises:
        RuntimeError: the device does not decode what was compressed.
    """
    return compress_originals(name, draw_originals(matrices, slices))


def draw_originals(
    matrices: Mapping[str, tuple[int, ...]], slices: int
) -> dict[str, BFloat16[Array, "slices ..."]]:
    """Draws a stack of `slices` different slices for each matrix, on the default device."""
    keys = jax.random.split(jax.random.key(len(matrices)), len(matrices))
    return {
        matrix: draw(key, (slices, *shape))
        for key, (matrix, shape) in zip(keys, matrices.items(), strict=True)
    }


def compress_originals(
    name: str, originals: Mapping[str, BFloat16[Array, "slices ..."]]
) -> Workload:
    """Compresses a workload, and verifies on the device that it decodes it.

    Args:
        name: the name of the workload.
        originals: the name and the stack of each matrix.

    Raises:
        RuntimeError: the device does not decode what was compressed.
    """
    # Verified below, on the device.
    arrays = tuple(compress(stack, stack_axes=1, verify=False) for stack in originals.values())
    workload = Workload(name, arrays)
    decode = jax.jit(lambda arrays, index: decode_slices(arrays, index, names=list(originals)))
    for index in range(workload.slices):
        decoded = decode(arrays, jnp.int32(index))
        for matrix, got in zip(originals, decoded, strict=True):
            if not _same_bits(got, originals[matrix], index):
                raise RuntimeError(
                    f"{name}: {matrix}, slice {index} of {workload.slices}, does not come back bit "
                    f"for bit on {jax.devices()[0].device_kind}; nothing was timed"
                )
    return workload


@jax.jit
def _same_bits(
    got: BFloat16[Array, "..."], originals: BFloat16[Array, "slices ..."], index: int
) -> Bool[Array, ""]:
    expected = jax.lax.dynamic_index_in_dim(originals, index, keepdims=False)
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return jnp.all(bits(got) == bits(expected))


def repeat_slices(workload: Workload, slices: int) -> Workload:
    """A workload of more slices, which are those of another one over and over."""
    order = jnp.arange(slices) % workload.slices
    return dataclasses.replace(workload, arrays=tuple(array[order] for array in workload.arrays))
