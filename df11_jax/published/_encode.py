"""The encoder of published units, on the host."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import BFloat16

from df11_jax._host_arrays import BFLOAT16
from df11_jax._host_codec import cpu_library, thread_count
from df11_jax.published import _codebook
from df11_jax.published._unit import MAX_SIZE, PublishedUnit, unit_label


def encode_unit(
    tensors: Mapping[str, BFloat16[np.ndarray, "..."]], *, threads: int | None = None
) -> PublishedUnit:
    """Compresses tensors as one unit, on the host.

    The arrays are those that the reference implementation makes of the same tensors. The reference
    fails to make `luts` if the end symbol's code is at most eight bits long and all 0, as it always
    is with one distinct exponent and often with few. In that case, the entries that it fails to
    fill lead to a code here.

    Args:
        tensors: the tensors by name, in the order in which they are to be concatenated.
        threads: the number of threads; None for all that this process may run on.

    Returns:
        The unit, with numpy arrays.

    Raises:
        TypeError: a tensor is not bfloat16.
        ValueError: there are no elements, or the layout cannot hold them: an exponent is 240 or
            more (as of infinities and NaNs), there are 2^32 elements or more, or the code needs
            too many look-up tables.
    """
    parts = [_bits(name, tensor) for name, tensor in tensors.items()]
    shapes = tuple(tuple(np.shape(tensor)) for tensor in tensors.values())
    size = sum(map(len, parts))
    label = unit_label(tuple(tensors))
    if not 0 < size <= MAX_SIZE:
        raise ValueError(
            f"{label}: {size} elements in all, and a unit has at least 1 and at most {MAX_SIZE}"
        )
    threads = thread_count(threads)
    piece_counts = cpu_library().published_histogram(parts, threads)
    counts = piece_counts.sum(axis=0, dtype=np.int64)
    if counts[_codebook.FIRST_POINTER :].any():
        _refuse_large_exponents(tensors)
    try:
        code = _codebook.build_codebook(counts)
    except ValueError as error:
        raise ValueError(f"{label}: cannot be published as one unit: {error}") from None
    encoded_exponent, sign_mantissa, output_positions, gaps = cpu_library().published_encode(
        parts, piece_counts, code.bits, code.lengths, code.end.bits, code.end.length, threads
    )
    return PublishedUnit(
        sign_mantissa,
        encoded_exponent,
        code.luts,
        output_positions,
        gaps,
        names=tuple(tensors),
        shapes=shapes,
    )


def _bits(name: str, tensor: Any) -> np.ndarray:
    if not isinstance(tensor, np.ndarray) or tensor.dtype != BFLOAT16:
        raise TypeError(
            f"{name}: a published unit is made of numpy arrays of bfloat16, got "
            f"{getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint16)


def _refuse_large_exponents(tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        exponents = _bits(name, tensor) >> 7 & 0xFF
        at = int(np.argmax(exponents >= _codebook.FIRST_POINTER))
        if exponents.size and exponents[at] >= _codebook.FIRST_POINTER:
            index = tuple(map(int, np.unravel_index(at, tensor.shape)))
            raise ValueError(
                f"{name}: element {index} is {float(tensor[index])!r}, and the published layout "
                f"holds only numbers below 2^113 in magnitude (its exponent is {exponents[at]}, of "
                f"which there are 0 to {_codebook.FIRST_POINTER - 1}). Leave this tensor as it is, "
                "or use the native layout, which holds all"
            )
