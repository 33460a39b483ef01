"""The native layout, version 2: the part of docs/format.md that Python needs.

The same constants and index arithmetic as `xla_ffi/native/layout.h`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import UInt32

from df11_jax._brief import brief

FORMAT_VERSION = 2

LANES = 32
STEP_ROWS = 16
MAX_STEPS = 8  # of a chunk
TILE_COLS = 64
HALF_STEP_WORDS = 128  # of sign_mantissa, and of the exponents of a raw chunk
STEP_WORDS = 2 * HALF_STEP_WORDS

MIN_CODE_BITS = 9  # that the longest code may have
MAX_CODE_BITS = 12
TABLE_SIZE = 1 << MAX_CODE_BITS
CODED_EXPONENTS = 16
SYMBOLS = CODED_EXPONENTS**2

MAX_DIMS = 8
MAX_PARTS = 0xFFFF  # along an axis
HEADER_WORDS = 28
CODEBOOK_WORDS = (CODED_EXPONENTS + SYMBOLS // 2) // 4
# Words of the header.
_GEOMETRY = 3
_DIMS = 4
_PARTS = 20
CODEBOOK_ID = 24  # what begins here may differ between the slices of a stack

RECORD_HEADER_WORDS = 10
RAW_RECORD_HEADER_WORDS = 2
RAW_CHUNK = 0xFFFF

SIGN_MANTISSA = 0x807F807F  # sign and mantissa of both weights of a pair

PAYLOAD = ("header", "codebook", "chunk_offsets", "exponents", "sign_mantissa")

# A chunk takes a GPU's warp about 1 us a step, and a tensor of a few hundred chunks leaves most of
# the GPU idle. So such have chunks of fewer steps, though those cost 0.04 or 0.13 bits a weight; an
# H200 decodes 1 M weights in 12.4, 8.7 and 7.0 us with 8, 4 and 2 steps (docs/figures.md). Smaller
# tensors are too small to matter, and larger ones have chunks enough.
_STEPS_OF_SIZES = {range(1 << 20, 1 << 21): 2, range(1 << 21, 1 << 23): 4}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a slice is a matrix, and how that is cut.

    Attributes:
        shape: the shape of the slice.
        batch_axes: the number of leading axes that count matrices.
        row_axes: the number of axes after these that are the matrix's rows; the others are its
            columns.
        along_columns: whether the two weights of a pair are in neighbouring columns, as a product
            with the matrix's transpose reads them; else they are in neighbouring rows.
        steps: the number of steps of 16 rows (or columns) in a chunk: 8, 4 or 2.
        code_bits: the bits of the longest code, from 9 to 12.
        parts: the number of parts into which each axis is divided; empty if the slice is not
            divided.
    """

    shape: tuple[int, ...]
    batch_axes: int = 0
    row_axes: int = 0
    along_columns: bool = False
    steps: int = MAX_STEPS
    code_bits: int = MAX_CODE_BITS
    parts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields, in types that JSON knows."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            KeyError: a field is missing.
            TypeError: a field is of another type.
            ValueError: there is no such layout.
        """
        values = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        values |= {name: tuple(values[name]) for name in ("shape", "parts")}
        layout = cls(**values)
        counts = (layout.batch_axes, layout.row_axes, layout.steps, layout.code_bits)
        limits = ((counts, 1 << 8), (layout.parts, 1 << 16), (layout.shape, 1 << 63))
        is_sound = (
            len(values) == len(fields)
            and type(layout.along_columns) is bool
            and all(type(n) is int and 0 <= n < end for numbers, end in limits for n in numbers)
            and len(layout.shape) <= MAX_DIMS
            and 0 not in layout.parts
        )
        # A header names each layout, but for those that there are not.
        if not is_sound or unpack_header(pack_header(layout)) != layout:
            raise ValueError(f"there is no such layout: {brief(fields)}")
        return layout

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of each part; that of the slice if it is not divided."""
        parts = self.parts or (1,) * len(self.shape)
        return tuple(dim // count for dim, count in zip(self.shape, parts, strict=True))

    @property
    def view(self) -> "View":
        """How each part is seen."""
        shape = self.part_shape
        rows_end = self.batch_axes + self.row_axes
        batch = math.prod(shape[: self.batch_axes])
        rows = math.prod(shape[self.batch_axes : rows_end])
        cols = math.prod(shape[rows_end:])
        size = batch * rows * cols
        if self.row_axes and rows_end < len(shape) and size and cols % 8 == 0:
            k, n = (cols, rows) if self.along_columns else (rows, cols)
            padded = batch * round_up(k, STEP_ROWS) * round_up(n, TILE_COLS)
            if 32 * (padded - size) <= size:
                return View(size, batch, k, n, self.steps, self.along_columns, False)
        return View(size, 1, -(-size // TILE_COLS), TILE_COLS, self.steps, False, True)


def make_layout(
    shape: Sequence[int],
    *,
    batch_axes: int = 0,
    row_axes: int | None = None,
    along_columns: bool = False,
    parts: Sequence[int] = (),
) -> Layout:
    """The layout that a writer chooses for slices of a shape.

    Args:
        shape: the shape of a slice.
        batch_axes: see `Layout`.
        row_axes: see `Layout`; None for all axes between the batch axes and the last one.
        along_columns: see `Layout`.
        parts: see `Layout`.

    Raises:
        ValueError: there are not as many axes, or more than the format can say; or an axis cannot
            be divided into as many parts.
    """
    shape = tuple(shape)
    if len(shape) > MAX_DIMS:
        raise ValueError(
            f"a compressed tensor has at most {MAX_DIMS} dimensions (besides its stack axes), "
            f"got shape {shape}"
        )
    if row_axes is None:
        row_axes = max(0, len(shape) - batch_axes - 1)
    if batch_axes < 0 or row_axes < 0 or batch_axes + row_axes > len(shape):
        raise ValueError(
            f"slices of shape {shape} do not have {batch_axes} batch axes and {row_axes} row axes"
        )
    parts = tuple(parts)
    if parts and any(
        not 0 < n <= MAX_PARTS or dim % n for dim, n in zip(shape, parts, strict=True)
    ):
        raise ValueError(f"slices of shape {shape} cannot be divided into {parts} parts")
    size = math.prod(shape) // math.prod(parts)
    steps = next((n for sizes, n in _STEPS_OF_SIZES.items() if size in sizes), MAX_STEPS)
    return Layout(shape, batch_axes, row_axes, along_columns, steps, parts=parts)


@dataclasses.dataclass(frozen=True)
class View:
    """Slices seen as matrices of k x n, which are cut into chunks of 16 `steps` k x 64 n.

    With pairs along columns, all chunks at the same n are a band, 64 rows of a matrix, the last one
    perhaps fewer. Bands can be decoded alone.

    Attributes:
        size: the number of weights.
        batch: the number of matrices.
        k: the length of the axis that pairs run along.
        n: the length of the other axis.
        steps: the number of steps of a chunk.
        along_columns: whether neighbours in k are neighbours in memory.
        is_flat: whether the weights are one sequence, of 64 a k; the last k may be incomplete.
    """

    size: int
    batch: int
    k: int
    n: int
    steps: int
    along_columns: bool
    is_flat: bool

    @property
    def tiles_k(self) -> int:
        return -(-self.k // (STEP_ROWS * self.steps))

    @property
    def tiles_n(self) -> int:
        return -(-self.n // TILE_COLS)

    @property
    def chunks(self) -> int:
        return self.batch * self.tiles_k * self.tiles_n

    @property
    def bands(self) -> int:
        """The number of bands of all matrices."""
        return self.batch * self.tiles_n

    @property
    def band(self) -> "View":
        """How a band is seen that is alone."""
        return View(TILE_COLS * self.k, 1, self.k, TILE_COLS, self.steps, True, False)

    @property
    def steps_k(self) -> int:
        """The number of steps below each other; the last chunk may have fewer than others."""
        return -(-self.k // STEP_ROWS)

    @property
    def sign_mantissa_words(self) -> int:
        return self.batch * self.steps_k * self.tiles_n * STEP_WORDS


def round_up(n: int, multiple: int) -> int:
    """The next multiple that is not less."""
    return -(-n // multiple) * multiple


def pack_header(layout: Layout) -> UInt32[np.ndarray, "28"]:
    """The header of slices of a layout, without the id of a codebook."""
    header = np.zeros(HEADER_WORDS, np.uint32)
    ndim = len(layout.shape)
    header[0] = FORMAT_VERSION
    header[1] = (
        ndim | layout.batch_axes << 8 | layout.row_axes << 16 | int(layout.along_columns) << 24
    )
    header[2] = layout.steps | layout.code_bits << 8
    for i, dim in enumerate(layout.part_shape):
        header[_DIMS + 2 * i : _DIMS + 2 * i + 2] = dim & 0xFFFFFFFF, dim >> 32
    for i, count in enumerate(layout.parts):
        header[_PARTS + i // 2] |= np.uint32(count << 16 * (i % 2))
    header[_GEOMETRY] = _digest(header)
    return header


def unpack_header(header: UInt32[np.ndarray, "28"]) -> Layout:
    """The layout that a header names.

    Args:
        header: the header of one slice, on the host.

    Raises:
        ValueError: it is not a header, or of a format version that this library does not know.
    """
    header = np.asarray(header)
    if header.shape != (HEADER_WORDS,) or header.dtype != np.uint32:
        raise ValueError(
            f"a header is {HEADER_WORDS} uint32 words, got {header.dtype}{list(header.shape)}"
        )
    version = int(header[0])
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format version {version} is unknown: this version of df11_jax reads {FORMAT_VERSION}"
        )
    ndim, batch_axes, row_axes, order = int(header[1]).to_bytes(4, "little")
    steps, code_bits = int(header[2]) & 255, int(header[2]) >> 8 & 255
    dims = [int(low) | int(high) << 32 for low, high in header[_DIMS:_PARTS].reshape(-1, 2)]
    counts = [
        int(word) >> shift & 0xFFFF for word in header[_PARTS:CODEBOOK_ID] for shift in (0, 16)
    ]
    parts = tuple(counts[:ndim]) if any(counts) else ()
    is_sound = (
        ndim <= MAX_DIMS
        and batch_axes + row_axes <= ndim
        and order <= 1
        and steps in (8, 4, 2)
        and MIN_CODE_BITS <= code_bits <= MAX_CODE_BITS
        and (not parts or min(parts) > 0)
    )
    if is_sound:
        shape = tuple(dim * n for dim, n in zip(dims, parts or (1,) * ndim, strict=False))
        layout = Layout(shape, batch_axes, row_axes, order == 1, steps, code_bits, parts)
        if np.array_equal(pack_header(layout)[:CODEBOOK_ID], header[:CODEBOOK_ID]):
            return layout
    raise ValueError("the header is corrupt")


def _digest(header: UInt32[np.ndarray, "28"]) -> int:
    acc = 0
    for i, word in enumerate(header[:CODEBOOK_ID].tolist()):
        if i != _GEOMETRY:
            acc = (acc * 0x9E3779B1 + word) & 0xFFFFFFFF
            acc = (acc << 13 | acc >> 19) & 0xFFFFFFFF
    acc ^= acc >> 16
    acc = acc * 0x7FEB352D & 0xFFFFFFFF
    return acc ^ acc >> 15


def check_payload(
    payload: Sequence[Any], layout: Layout, name: str, *, some_parts: bool = False
) -> tuple[int, ...]:
    """Checks types and shapes of the five arrays of a compressed tensor against its layout.

    Args:
        payload: the arrays, or anything with their dtypes and shapes, in the order of `PAYLOAD`.
        layout: the layout of one slice.
        name: the name of the tensor, for messages.
        some_parts: whether they may be those of some of the parts, as one device has them.

    Returns:
        The stack axes, which all five have in common.

    Raises:
        ValueError: the arrays do not fit; the message names the tensor, the array, what was
            expected and what was found.
    """
    view = layout.view
    words = (HEADER_WORDS, CODEBOOK_WORDS, view.chunks + 1, None, view.sign_mantissa_words)
    leading = tuple(payload[0].shape[:-1])
    stack = leading[: len(leading) - len(layout.parts)]
    parts = layout.parts
    if some_parts:
        there = leading[len(stack) :]
        if len(there) == len(parts) and 0 not in there:
            if not any(n % m for n, m in zip(parts, there, strict=True)):
                parts = there
    for part, array, expected in zip(PAYLOAD, payload, words, strict=True):
        shape = tuple(array.shape)
        fits = shape and (shape[-1] % 4 == 0 if expected is None else shape[-1] == expected)
        if array.dtype != np.uint32 or shape[:-1] != (*stack, *parts) or not fits:
            last = "a multiple of 4" if expected is None else expected
            want = ", ".join(map(str, (*stack, *parts, last)))
            is_moved = expected in shape[:-1] and shape[-1] != expected
            hint = (
                f". Its {expected} words are to be its last axis, and axes of a stack in front of "
                "that: out_axes=0 of jax.vmap puts them there"
            )
            raise ValueError(
                f"{name}: {part} is {array.dtype}{list(shape)}, expected uint32[{want}] for slices "
                f"of shape {list(layout.shape)}" + (hint if is_moved else "")
            )
    return stack
