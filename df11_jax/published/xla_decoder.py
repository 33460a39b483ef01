"""The decoder of published units in plain XLA operations.

It is for backends without a kernel, and tests compare the other decoders with it.

Below, the stream has B blocks and W = 512 B windows. All windows are decoded at once, code by code,
twice: first to count their elements, and then, when the place of each window's elements is known,
to write them.

A traced program cannot raise, so a block that fails a check becomes NaNs (all bits set).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, UInt8, UInt32

from df11_jax.published import _codebook

# Larger units would need 64-bit indices.
MAX_SIZE = 2**31 - 1

_U32 = jnp.uint32
_BLOCK_WINDOWS = 512
_WINDOW_BITS = 64
_MAX_BLOCK_ELEMENTS = _BLOCK_WINDOWS * _WINDOW_BITS
_NOT_WRITTEN = 256  # in place of an exponent


@jax.jit
def decode(
    sign_mantissa: UInt8[Array, " n"],
    encoded_exponent: UInt8[Array, " bytes"],
    luts: UInt8[Array, "rows_and_lengths 256"],
    output_positions: UInt32[Array, " blocks_and_end"],
    gaps: UInt8[Array, " gap_bytes"],
) -> BFloat16[Array, " n"]:
    """Decodes a unit: the same contract as the FFI call.

    Args:
        sign_mantissa: the sign and mantissa of each element.
        encoded_exponent: the stream of codes.
        luts: the look-up tables, and the codes' lengths.
        output_positions: the first element of each block.
        gaps: the bit of each window at which the first code starts.

    Returns:
        The elements. In a corrupt block, all elements have all bits set, which is a NaN; so have
        all elements of the unit if the first gap or an end of `output_positions` is corrupt.
    """
    size, stream_bytes = sign_mantissa.shape[0], encoded_exponent.shape[0]
    last = len(output_positions) - 1
    block = jnp.arange(-(-stream_bytes // (8 * _BLOCK_WINDOWS)))
    start = output_positions[jnp.minimum(block, last)]
    end = output_positions[jnp.minimum(block + 1, last)]
    is_last = end == size
    block_ok = (start <= end) & (end <= size) & (end - start <= _MAX_BLOCK_ELEMENTS)
    gap = _unpack_gaps(gaps)
    block_ok &= (output_positions[0] == 0) & (output_positions[-1] == size) & (gap[0] == 0)

    windows = _Windows(luts, _stream_words(encoded_exponent, len(block)))
    codes = _count(windows, gap)
    by_block = codes.number.reshape(-1, _BLOCK_WINDOWS)
    ends = start[:, None] + jnp.cumsum(by_block, axis=1, dtype=_U32)
    place = (ends - by_block).reshape(-1)

    # Each window must end where the next one begins, unless no element starts there.
    next_gap = jnp.append(gap[1:], gap[:1])
    joined = codes.ok & (codes.offset - _WINDOW_BITS == next_gap)
    is_over = is_last[:, None] & (ends >= end[:, None])
    block_ok &= jnp.all(joined.reshape(-1, _BLOCK_WINDOWS) | is_over, axis=1)
    block_ok &= jnp.where(is_last, ends[:, -1] >= end, ends[:, -1] == end)

    in_block = jnp.repeat(end, _BLOCK_WINDOWS) - place
    has_elements = (place < jnp.repeat(end, _BLOCK_WINDOWS)) & jnp.repeat(block_ok, _BLOCK_WINDOWS)
    wanted = jnp.where(has_elements, jnp.minimum(codes.number, in_block), 0)
    exponents, offset = _write(windows, gap, wanted, place, sign_mantissa)

    # The stream must end with the last element.
    end_byte = 8 * jnp.arange(len(gap)) + (offset.astype(jnp.int32) + 7) // 8
    end_byte = jnp.max(jnp.where(wanted > 0, end_byte, 0))
    in_last = jnp.arange(size, dtype=_U32) >= jnp.max(jnp.where(is_last, 0, end))
    ok = (exponents != _NOT_WRITTEN) & ~(in_last & (end_byte != stream_bytes))
    other = sign_mantissa.astype(jnp.uint16)
    weights = (other & 0x80) << 8 | exponents << 7 | (other & 0x7F)
    return jax.lax.bitcast_convert_type(jnp.where(ok, weights, jnp.uint16(0xFFFF)), jnp.bfloat16)


class _Windows(NamedTuple):
    """The look-up tables, and the words of each window in which codes are looked up."""

    luts: UInt8[Array, "rows_and_lengths 256"]
    words: tuple[UInt32[Array, " W"], UInt32[Array, " W"], UInt32[Array, " W"]]

    def look_up(
        self, offset: UInt32[Array, " W"]
    ) -> tuple[UInt32[Array, " W"], UInt32[Array, " W"]]:
        """The exponents whose codes start at these bits, and the codes' lengths; 0 if invalid."""
        first, second, third = self.words
        high = jnp.where(offset < 32, first, second)
        low = jnp.where(offset < 32, second, third)
        bits = high << (offset & 31) | low >> 1 >> (31 - (offset & 31))

        rows = self.luts.shape[0] - 1
        entry = self.luts[0][bits >> 24]
        ok = jnp.ones_like(offset, bool)
        before = jnp.zeros_like(offset)  # bits before those of the last row
        for shift in (16, 8, 0):
            row = _codebook.ROW_ENTRIES - entry.astype(_U32)
            follows = entry >= _codebook.FIRST_POINTER
            ok &= ~follows | (row < rows)
            before += 8 * follows.astype(_U32)
            following = self.luts[jnp.minimum(row, rows - 1), bits >> shift & 0xFF]
            entry = jnp.where(follows, following, entry)
        length = self.luts[-1][entry].astype(_U32)
        # The place of the end symbol, which is no element, repeats an entry, perhaps across rows.
        ok &= (entry < _codebook.FIRST_POINTER) & (before < length) & (length <= before + 8)
        return entry.astype(_U32), jnp.where(ok, length, 0)


class _Codes(NamedTuple):
    """The codes that start in each window."""

    number: UInt32[Array, " W"]
    offset: UInt32[Array, " W"]  # where the last one ends
    ok: Bool[Array, " W"]  # all of them are codes


def _count(windows: _Windows, gap: UInt32[Array, " W"]) -> _Codes:
    def has_more(codes: _Codes) -> Bool[Array, " W"]:
        return codes.ok & (codes.offset < _WINDOW_BITS)

    def step(codes: _Codes) -> _Codes:
        _, length = windows.look_up(codes.offset)
        length = jnp.where(has_more(codes), length, 0)
        ok = codes.ok & ~(has_more(codes) & (length == 0))
        return _Codes(codes.number + (length > 0), codes.offset + length, ok)

    state = _Codes(number=jnp.zeros_like(gap), offset=gap, ok=gap < _WINDOW_BITS)
    return jax.lax.while_loop(lambda codes: jnp.any(has_more(codes)), step, state)


def _write(
    windows: _Windows,
    gap: UInt32[Array, " W"],
    wanted: UInt32[Array, " W"],
    place: UInt32[Array, " W"],
    sign_mantissa: UInt8[Array, " n"],
) -> tuple[Array, UInt32[Array, " W"]]:
    """The exponents, or _NOT_WRITTEN, and the bit at which each window's last wanted code ends."""

    def step(
        state: tuple[UInt32[Array, " W"], UInt32[Array, " W"], Array],
    ) -> tuple[UInt32[Array, " W"], UInt32[Array, " W"], Array]:
        done, offset, exponents = state
        active = done < wanted
        exponent, length = windows.look_up(offset)
        # Exponents that are not to be written go out of bounds, where scatters drop them.
        at = jnp.where(active, place + done, len(exponents)).astype(jnp.int32)
        exponents = exponents.at[at].set(exponent.astype(jnp.uint16), mode="drop")
        return done + active, offset + jnp.where(active, length, 0), exponents

    exponents = jnp.full_like(sign_mantissa, _NOT_WRITTEN, jnp.uint16)
    state = (jnp.zeros_like(gap), gap, exponents)
    _, offset, exponents = jax.lax.while_loop(lambda s: jnp.any(s[0] < wanted), step, state)
    return exponents, offset


def _stream_words(
    encoded_exponent: UInt8[Array, " bytes"], blocks: int
) -> tuple[UInt32[Array, " W"], UInt32[Array, " W"], UInt32[Array, " W"]]:
    """The two words of each window, and the word that follows."""
    count = 2 * _BLOCK_WINDOWS * blocks + 2
    padded = jnp.pad(encoded_exponent, (0, 4 * count - encoded_exponent.shape[0])).astype(_U32)
    words = jnp.sum(padded.reshape(-1, 4) << jnp.arange(24, -8, -8, dtype=_U32), axis=1, dtype=_U32)
    return words[0:-2:2], words[1:-2:2], words[2::2]


def _unpack_gaps(gaps: UInt8[Array, " gap_bytes"]) -> UInt32[Array, " W"]:
    """Unpacks the gaps, of which eight are in five bytes."""
    groups = jnp.pad(gaps.reshape(-1, 5), ((0, 0), (0, 1))).astype(_U32)
    first_bit = 5 * jnp.arange(8)
    two_bytes = groups[:, first_bit // 8] << 8 | groups[:, first_bit // 8 + 1]
    return (two_bytes >> (11 - first_bit % 8).astype(_U32) & 31).reshape(-1)
