"""Arrays compared bit by bit."""

import numpy as np

from df11_jax._host_arrays import as_bytes

_CHUNK = 1 << 20  # elements that are compared at a time, so that they stay in the cache


def have_same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and not first_difference(a, b)


def first_difference(a: np.ndarray, b: np.ndarray) -> str:
    """Describes where two arrays of the same shape and dtype differ; empty if they do not."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    flat_a, flat_b = (as_bytes(array).view(bits) for array in (a, b))
    count, first = 0, -1
    for begin in range(0, a.size, _CHUNK):
        end = begin + _CHUNK
        unequal = flat_a[begin:end] != flat_b[begin:end]
        if unequal.any():
            if not count:
                first = begin + int(unequal.argmax())
            count += int(unequal.sum())
    if not count:
        return ""
    index = ", ".join(str(i) for i in np.unravel_index(first, a.shape))
    digits = 2 + 2 * bits.itemsize
    return (
        f"[{index}] is {flat_a[first]:#0{digits}x} in the first, {flat_b[first]:#0{digits}x} in "
        f"the second; {count:,} of {a.size:,} elements of this tensor differ"
    )
