"""The compiled encoder and decoder, of numpy arrays: no devices, no tracing."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import BFloat16, UInt32

from df11_jax import _layout
from df11_jax._host_arrays import BFLOAT16

Payload = Sequence[UInt32[np.ndarray, "*stack words"]]


def encode(
    weights: BFloat16[np.ndarray, "..."],
    name: str,
    *,
    stack_axes: int = 0,
    verify: bool = True,
    threads: int | None = None,
) -> Payload:
    """Encodes a tensor.

    Args:
        weights: the tensor, in a contiguous array.
        name: the name of the tensor, for messages.
        stack_axes: the number of leading axes that are a stack.
        verify: decode the result, and compare it with `weights` bit by bit.
        threads: the number of threads; None for all that this process may run on.

    Returns:
        The five arrays of the specification.

    Raises:
        ValueError: the slices have too many dimensions, or the tensor has fewer than `stack_axes`.
        RuntimeError: verification failed.
    """
    if not 0 <= stack_axes <= weights.ndim:
        raise ValueError(
            f"{name}: cannot take {stack_axes} stack axes from an array of shape {weights.shape}"
        )
    stack_shape, slice_shape = weights.shape[:stack_axes], weights.shape[stack_axes:]
    if len(slice_shape) > _layout.MAX_DIMS:
        raise ValueError(
            f"{name}: slices of shape {slice_shape} have more than {_layout.MAX_DIMS} dimensions; "
            "reshape the array, or make leading axes stack axes"
        )
    library = cpu_library()
    bits = _stack_of_bits(weights, stack_axes)
    threads = threads or available_threads()
    words = library.encode(bits, list(slice_shape), threads)
    if verify:
        at = library.find_difference(bits, list(slice_shape), *words[1:], threads)
        if at >= 0:
            raise RuntimeError(
                f"{name}: element {tuple(map(int, np.unravel_index(at, weights.shape)))} does not "
                "come back as it was; the original is untouched. Please report this: it is a bug, "
                "or broken hardware"
            )
    return tuple(w.reshape(*stack_shape, w.shape[-1]) for w in words)


def decode(
    payload: Payload, slice_shape: tuple[int, ...], name: str
) -> BFloat16[np.ndarray, "..."]:
    """Decodes a tensor, or a whole stack.

    Args:
        payload: the five arrays.
        slice_shape: the shape of a slice, as their header states it.
        name: the name of the tensor, for messages.

    Returns:
        The tensor.

    Raises:
        ValueError: the arrays do not fit each other, or are corrupt.
    """
    stack_shape = _layout.check_payload(payload, slice_shape, name)
    header = _layout.pack_header(slice_shape)
    if np.any(payload[0] != header):
        raise ValueError(f"{name}: not all slices have a header of the shape {slice_shape}")
    weights = np.empty(stack_shape + slice_shape, BFLOAT16)
    bits = _stack_of_bits(weights, len(stack_shape))
    words = [np.ascontiguousarray(part).reshape(bits.shape[0], -1) for part in payload[1:]]
    at = cpu_library().decode(bits, list(slice_shape), *words, available_threads())
    if at >= 0:
        index, chunk = divmod(at, _layout.make_view(slice_shape).chunks)
        raise ValueError(f"{name}: is corrupt: chunk {chunk} of slice {index}")
    return weights


def available_threads() -> int:
    """The number of threads that this process may run at a time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _stack_of_bits(weights: np.ndarray, stack_axes: int) -> np.ndarray:
    stack = int(np.prod(weights.shape[:stack_axes], dtype=np.int64))
    slice_size = int(np.prod(weights.shape[stack_axes:], dtype=np.int64))
    return weights.view(np.uint16).reshape(stack, slice_size)


def cpu_library() -> Any:
    """The compiled library, which is imported here since `import df11_jax` does not need it.

    Raises:
        ImportError: there is no compiled library.
    """
    try:
        return importlib.import_module("df11_jax._cpu_library")
    except ImportError as error:
        raise ImportError(
            f"df11_jax in {os.path.dirname(__file__)} has no compiled library ({error}). If that "
            "is the source tree, install it (pip install .) and start Python somewhere else"
        ) from error
