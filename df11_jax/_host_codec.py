"""The compiled encoder and decoder, of numpy arrays: no devices, no tracing."""

import importlib
import math
import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import BFloat16, UInt32

from df11_jax import _layout, _parts
from df11_jax._host_arrays import BFLOAT16, as_bytes, empty_aligned
from df11_jax._layout import Layout

Payload = Sequence[UInt32[np.ndarray, "*stack words"]]


def encode(
    weights: BFloat16[np.ndarray, "..."],
    name: str,
    layout: Layout,
    *,
    parts: Sequence[int] | None = None,
    share_codebook: bool = False,
    verify: bool = True,
    threads: int | None = None,
) -> Payload:
    """Encodes a tensor.

    Args:
        weights: the tensor, in a contiguous array; its axes before those of the layout are a stack.
        name: the name of the tensor, for messages.
        layout: the layout of its slices.
        parts: the number of parts along each axis that `weights` holds; None for all.
        share_codebook: use one codebook for all slices.
        verify: decode the result, and compare it with `weights` bit by bit.
        threads: the number of threads; None for all that this process may run on.

    Returns:
        The five arrays of the specification.

    Raises:
        TypeError: `threads` is not an integer.
        ValueError: `threads` is below 1.
        RuntimeError: verification failed.
    """
    parts = layout.parts if parts is None else tuple(parts)
    stack_axes = weights.ndim - len(layout.shape)
    leading = weights.shape[:stack_axes] + parts
    divided = np.ascontiguousarray(_parts.divide(weights, parts))
    header = _layout.pack_header(layout)
    library = cpu_library()
    bits = _stack_of_bits(divided, len(leading))
    threads = thread_count(threads)
    words = library.encode(bits, header, share_codebook, threads)
    if verify:
        at = library.find_difference(bits, header, *words[1:], threads)
        if at >= 0:
            raise RuntimeError(
                f"{name}: element {tuple(map(int, np.unravel_index(at, divided.shape)))} does not "
                "come back as it was; the original is untouched. Please report this: it is a bug, "
                "or broken hardware"
            )
    return tuple(w.reshape(*leading, w.shape[-1]) for w in words)


def decode(payload: Payload, layout: Layout, name: str) -> BFloat16[np.ndarray, "..."]:
    """Decodes a tensor, or a whole stack.

    Args:
        payload: the five arrays.
        layout: the layout of a slice, as their header states it.
        name: the name of the tensor, for messages.

    Returns:
        The tensor.

    Raises:
        ValueError: the arrays do not fit each other, or are corrupt.
    """
    stack_shape, header, words = _slices(payload, layout, name)
    parts = empty_aligned((*stack_shape, *layout.parts, *layout.part_shape), BFLOAT16)
    bits = _stack_of_bits(parts, parts.ndim - len(layout.shape))
    at = cpu_library().decode(bits, header, *words, available_threads())
    if at >= 0:
        raise _corrupt_chunk(at, layout, name)
    return _parts.join(parts, len(layout.parts))


def verify(payload: Payload, layout: Layout, name: str, *, threads: int | None = None) -> None:
    """Checks all that `decode` checks, without memory for the tensor.

    Args:
        payload: the five arrays.
        layout: the layout of a slice, as their header states it.
        name: the name of the tensor, for messages.
        threads: the number of threads; None for all that this process may run on.

    Raises:
        ValueError: the arrays do not fit each other, or are corrupt.
    """
    _, header, words = _slices(payload, layout, name)
    at = cpu_library().verify(header, *words, thread_count(threads))
    if at >= 0:
        raise _corrupt_chunk(at, layout, name)


def payload_digest(payload: Payload, layout: Layout, name: str) -> int:
    """A digest of all weights of a tensor or stack, which decodes none of them.

    It is the CRC-32 (zlib's) of the checksums of the chunks: of each slice in order, and of each of
    its chunks in order, the first word of the record, in little-endian bytes. That these checksums
    are right, `verify` checks.

    Args:
        payload: the five arrays.
        layout: the layout of a slice, as their header states it.
        name: the name of the tensor, for messages.

    Returns:
        The digest; 0 if there are no chunks.

    Raises:
        ValueError: the arrays do not fit each other, or chunk offsets are corrupt.
    """
    _, _, (_, chunk_offsets, exponents, _) = _slices(payload, layout, name)
    begin, end = chunk_offsets[:, :-1], chunk_offsets[:, 1:]
    outside = (begin >= end) | (end > exponents.shape[1])
    if outside.any():
        raise _corrupt_chunk(int(outside.argmax()), layout, name)
    return zlib.crc32(as_bytes(np.take_along_axis(exponents, begin, axis=1)).data)


def thread_count(threads: int | None) -> int:
    """The number of threads that a caller asked for; None asks for all.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1.
    """
    if threads is None:
        return available_threads()
    if not isinstance(threads, int | np.integer):
        raise TypeError(f"threads: expected an integer or None, got {threads!r}")
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1, or None for all")
    return int(threads)


def available_threads() -> int:
    """The number of threads that this process may run at a time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slices(
    payload: Payload, layout: Layout, name: str
) -> tuple[tuple[int, ...], np.ndarray, list[np.ndarray]]:
    """The stack axes, the header of all slices, and the other four arrays as [slices, words].

    Raises:
        ValueError: the arrays do not fit each other.
    """
    stack_shape = _layout.check_payload(payload, layout, name)
    header, known = _layout.pack_header(layout), _layout.CODEBOOK_ID
    if np.any(payload[0][..., :known] != header[:known]):
        raise ValueError(f"{name}: not all slices have a header of the shape {layout.shape}")
    slices = math.prod(payload[0].shape[:-1])
    words = [np.ascontiguousarray(part).reshape(slices, part.shape[-1]) for part in payload[1:]]
    return stack_shape, header, words


def _corrupt_chunk(at: int, layout: Layout, name: str) -> ValueError:
    """The error for a chunk, which is counted over the whole stack."""
    index, chunk = divmod(at, layout.view.chunks)
    return ValueError(f"{name}: is corrupt: chunk {chunk} of slice {index}")


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
