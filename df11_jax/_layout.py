"""The native layout, version 1: the part of docs/format.md that Python needs.

The same constants and index arithmetic as `xla_ffi/native/layout.h`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

FORMAT_VERSION = 1

LANES = 32
STEP_ROWS = 16
STEPS = 8  # at most, in a chunk
TILE_ROWS = STEP_ROWS * STEPS
TILE_COLS = 64
HALF_STEP_WORDS = 128  # of sign_mantissa, and of the exponents of a raw chunk
STEP_WORDS = 2 * HALF_STEP_WORDS

MAX_CODE_BITS = 12
TABLE_SIZE = 1 << MAX_CODE_BITS
CODED_EXPONENTS = 16
SYMBOLS = CODED_EXPONENTS**2

MAX_DIMS = 8
HEADER_WORDS = 20
CODEBOOK_WORDS = (CODED_EXPONENTS + SYMBOLS // 2) // 4

RECORD_HEADER_WORDS = 10
RAW_RECORD_HEADER_WORDS = 2
RAW_CHUNK = 0xFFFF

SIGN_MANTISSA = 0x807F807F  # sign and mantissa of both weights of a pair

PAYLOAD = ("header", "codebook", "chunk_offsets", "exponents", "sign_mantissa")


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class View:
    """One slice seen as a row-major matrix, which is cut into chunks of 128 x 64 weights.

    Attributes:
        size: the number of weights.
        rows, cols: the shape of the matrix; its last row may be incomplete in a flat view.
    """

    size: int
    rows: int
    cols: int

    @property
    def tile_rows(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def tile_cols(self) -> int:
        return -(-self.cols // TILE_COLS)

    @property
    def chunks(self) -> int:
        return self.tile_rows * self.tile_cols

    @property
    def step_rows(self) -> int:
        """Rows of steps in the whole matrix; the last ones of a tile row may be missing."""
        return -(-self.rows // STEP_ROWS)

    @property
    def sign_mantissa_words(self) -> int:
        return self.step_rows * self.tile_cols * STEP_WORDS


def make_view(shape: Sequence[int]) -> View:
    """The view of a slice of the given shape."""
    size = math.prod(shape)
    if len(shape) >= 2 and size > 0 and shape[-1] % 8 == 0:
        cols = shape[-1]
        rows = size // cols
        padded = _round_up(rows, STEP_ROWS) * _round_up(cols, TILE_COLS)
        if 50 * padded <= 51 * size:
            return View(size, rows, cols)
    return View(size, -(-size // TILE_COLS), TILE_COLS)


def pack_header(shape: Sequence[int]) -> UInt32[np.ndarray, "20"]:
    """The header of a slice of the given shape.

    Raises:
        ValueError: the shape has more dimensions than the format can hold.
    """
    if len(shape) > MAX_DIMS:
        raise ValueError(
            f"a compressed tensor has at most {MAX_DIMS} dimensions (besides its stack axes), "
            f"got shape {tuple(shape)}"
        )
    header = np.zeros(HEADER_WORDS, np.uint32)
    header[:2] = FORMAT_VERSION, len(shape)
    for i, dim in enumerate(shape):
        header[2 + 2 * i : 4 + 2 * i] = dim & 0xFFFFFFFF, dim >> 32
    return header


def unpack_header(header: UInt32[np.ndarray, "20"]) -> tuple[int, ...]:
    """The slice shape that a header states.

    Args:
        header: the header of one slice, on the host.

    Raises:
        ValueError: `header` is not one, or has a format version that this library does not know.
    """
    header = np.asarray(header)
    if header.shape != (HEADER_WORDS,) or header.dtype != np.uint32:
        raise ValueError(
            f"a header is {HEADER_WORDS} uint32 words, got {header.dtype}{list(header.shape)}"
        )
    version, ndim = int(header[0]), int(header[1])
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format version {version} is unknown: this version of df11_jax reads {FORMAT_VERSION}"
        )
    dims = header[2:].astype(np.uint64).reshape(-1, 2)
    shape = tuple(int(low | high << np.uint64(32)) for low, high in dims[:ndim])
    if ndim > MAX_DIMS or np.any(dims[ndim:]):
        raise ValueError("the header is corrupt")
    return shape


def check_payload(payload: Sequence[Any], slice_shape: Sequence[int], name: str) -> tuple[int, ...]:
    """Checks types and shapes of the five arrays of a compressed tensor against its shape.

    Args:
        payload: the arrays, or anything with their dtypes and shapes, in the order of `PAYLOAD`.
        slice_shape: the shape of one slice.
        name: the name of the tensor, for messages.

    Returns:
        The stack axes, which all five have in common.

    Raises:
        ValueError: an array has another dtype or shape; the message names it and the tensor.
    """
    view = make_view(slice_shape)
    words = (HEADER_WORDS, CODEBOOK_WORDS, view.chunks + 1, None, view.sign_mantissa_words)
    stack = tuple(payload[0].shape[:-1])
    for part, array, expected in zip(PAYLOAD, payload, words, strict=True):
        shape = tuple(array.shape)
        fits = shape and (shape[-1] % 4 == 0 if expected is None else shape[-1] == expected)
        if array.dtype != np.uint32 or shape[:-1] != stack or not fits:
            last = "a multiple of 4" if expected is None else expected
            want = ", ".join(map(str, (*stack, last)))
            raise ValueError(
                f"{name}: {part} is {array.dtype}{list(shape)}, expected uint32[{want}] for slices "
                f"of shape {list(slice_shape)}"
            )
    return stack
