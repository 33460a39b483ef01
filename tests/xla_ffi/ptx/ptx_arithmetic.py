"""What PTX instructions compute, on vectors of one element a thread."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from device_memory import KernelError

TYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("u", "u"), ("s", "i"), ("b", "u"))
    for bits in (8, 16, 32, 64)
} | {"pred": np.dtype(np.bool_), "f32": np.dtype(np.float32)}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_SIMPLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "dp4a": lambda a, b, c: sum(((a >> i & 255) * (b >> i & 255) for i in range(0, 32, 8)), c),
    "mad": lambda a, b, c: a * b + c,
    "max": np.maximum,
    "min": np.minimum,
    "mov": lambda a: a,
    "mul": np.multiply,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "popc": np.bitwise_count,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


def compute(name: Sequence[str], values: Sequence[Any]) -> Any:
    """The result of an instruction: `compute(("add", "u32"), [a, b])`.

    Args:
        name: the parts of its name; the last is the type.
        values: operands of that type; but shifts and places of bits are u32.

    Raises:
        KernelError: a division by zero.
    """
    kind, dtype = name[0], TYPES[name[-1]]
    if kind in _SIMPLE and name[1] not in ("wide", "hi"):
        if dtype.kind != "f":
            return _SIMPLE[kind](*values)
        with np.errstate(all="ignore"):  # of what is no number
            return _SIMPLE[kind](*values)
    if kind == "mul":
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        product = np.multiply(*(value.astype(wide) for value in values))
        return product if name[1] == "wide" else product >> wide.type(8 * dtype.itemsize)
    if kind in ("shl", "shr"):
        return _shift(kind, dtype, *values)
    if kind in ("div", "rem"):
        return _divide(kind, dtype, *values)
    if kind == "shf":
        low, high, n = values
        both, n = _join(low, high), (n & 31).astype(np.uint64)
        return (both << n) >> np.uint64(32) if name[1] == "l" else both >> n
    if kind == "prmt":
        return _permute(*values)
    if kind == "lop3":
        return _lop3(*values)
    if kind == "bfi":
        new, old, at, length = values
        mask = dtype.type(((1 << int(length)) - 1) << int(at))
        return (old & ~mask) | (new << dtype.type(at) & mask)
    if kind == "bfind":
        highest = np.frexp(values[0].astype(np.float64))[1] - 1
        found = 31 - highest if "shiftamt" in name else highest
        return np.where(values[0] == 0, np.uint32(2**32 - 1), found.astype(np.uint32))
    assert kind == "brev", name
    flipped = np.unpackbits(values[0][..., None].view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(flipped, axis=-1).view(">u4")[..., 0].astype(np.uint32)


def to_bfloat16x2(high: Any, low: Any) -> Any:
    """Two float32 vectors rounded to bfloat16, in words."""
    rounded = [value.astype(ml_dtypes.bfloat16).view(np.uint16) for value in (high, low)]
    return rounded[0].astype(np.uint32) << np.uint32(16) | rounded[1]


def multiply_add_tile(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`mma.m16n8k16` of a warp: bfloat16 factors, float32 sums, which are rounded once.

    Args:
        a: 16 x 16, as lanes have it: words [32, 4].
        b: 16 x 8, words [32, 2].
        c: 16 x 8, float32 [32, 4].

    Returns:
        a b + c, as c.
    """
    group, pair = np.divmod(np.arange(32), 4)
    left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    rows = group[:, None] + 8 * (np.arange(4) // 2)
    columns = 2 * pair[:, None] + np.arange(4) % 2
    sums[rows, columns] = c
    for half in range(2):
        shift = np.uint32(16 * (1 - half))
        mask = np.uint32(0xFFFF0000)
        for i in range(4):
            factor = (a[:, i] << shift & mask).view(np.float32)
            left[group + 8 * (i % 2), 2 * pair + 8 * (i // 2) + half] = factor
        for i in range(2):
            right[2 * pair + 8 * i + half, group] = (b[:, i] << shift & mask).view(np.float32)
    with np.errstate(all="ignore"):  # of what is no number
        return (left @ right + sums).astype(np.float32)[rows, columns]


def _shift(kind: str, dtype: np.dtype, a: Any, n: Any) -> Any:
    bits = 8 * dtype.itemsize  # shifts by more are shifts by as many
    if kind == "shl":
        shifted, gone = np.left_shift(a, np.minimum(n, bits - 1).astype(dtype)), dtype.type(0)
    else:
        shifted = np.right_shift(a, np.minimum(n, bits - 1).astype(dtype))
        gone = a >> dtype.type(bits - 1) if dtype.kind == "i" else dtype.type(0)
    return np.where(n < bits, shifted, gone)


def _divide(kind: str, dtype: np.dtype, a: Any, b: Any) -> Any:
    if np.any(b == 0):
        raise KernelError("division by zero")
    quotient = a // b
    if dtype.kind == "i":  # rounded towards zero, where numpy rounds down
        quotient = np.abs(a) // np.abs(b) * np.where((a < 0) != (b < 0), -1, 1)
    return quotient if kind == "div" else a - quotient * b


def _join(low: Any, high: Any) -> Any:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def _permute(a: Any, b: Any, selector: Any) -> Any:
    both = _join(a, b)
    out = np.zeros(np.broadcast(both, selector).shape, np.uint64)
    for i in range(4):
        control = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (np.uint64(8) * (control & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        out |= np.where(control >> np.uint64(3), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    out = np.zeros_like(a | b | c)
    for i in range(8):
        if int(table) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out
