"""The decoder in plain XLA operations: for backends without a kernel, and as a test oracle.

It follows docs/format.md on its own, one decoder for all slices, chunks and lanes at once. Shapes
below: N slices, C chunks, W words of exponents, T = 4 and G = 8 for lane 4 g + t, J = 8 pairs of
a lane in a half-step, H half-steps of a chunk. Only 32-bit integers are used.

A traced program cannot raise, so a chunk that fails a check becomes NaNs (all bits set).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Int32, UInt16, UInt32

from df11_jax import _layout
from df11_jax._layout import Layout, View
from df11_jax._symbolic import holds

_U32 = jnp.uint32
# Entries of the table are found by the next 12 bits of a stream, whose first bit is the lowest.
_BIT_REVERSED = np.array([int(f"{i:012b}"[::-1], 2) for i in range(_layout.TABLE_SIZE)], np.int32)


@functools.partial(jax.jit, static_argnames=("layout", "bands"))
def decode(
    index: Int32[Array, "*batch"],
    header: UInt32[Array, "*ones stack 28"],
    codebook: UInt32[Array, "*ones stack 36"],
    chunk_offsets: UInt32[Array, "*ones stack chunks_and_end"],
    exponents: UInt32[Array, "*ones stack words"],
    sign_mantissa: UInt32[Array, "*ones stack quads"],
    *,
    layout: Layout,
    bands: bool = False,
) -> BFloat16[Array, "*batch_and_slice"]:
    """Decodes slices of a stack, or bands of these: the same contract as the FFI call.

    Args:
        index: the indices of the slices, or of the bands of all, which are clamped to the stack.
        header: the headers of the stack. Like all its arrays, it has an axis of size 1 for each
            axis of `index` in front.
        codebook: the codebooks of the stack.
        chunk_offsets: the chunk offsets of the stack.
        exponents: the coded exponents of the stack.
        sign_mantissa: the signs and mantissas of the stack.
        layout: the layout of a slice; of a divided one, each part counts as a slice.
        bands: whether `index` counts bands: see `View`.

    Returns:
        The slices, or bands, `[*batch, 64, k]`. The weights of a corrupt chunk, or of all chunks of
        a slice whose header or codebook is corrupt, are NaNs with all bits set.
    """
    view, each = layout.view, layout.view.bands if bands else 1
    shape = index.shape + ((view.band.n, view.band.k) if bands else layout.part_shape)
    stack = header.shape[-2]
    if view.size == 0 or stack == 0 or index.size == 0:
        return jnp.zeros(shape, jnp.bfloat16)

    number = jnp.clip(index.reshape(-1), 0, stack * each - 1)
    which = number // each
    header, codebook, chunk_offsets, exponents, sign_mantissa = (
        array.reshape(stack, -1)
        for array in (header, codebook, chunk_offsets, exponents, sign_mantissa)
    )
    header = header[which]
    if holds(lambda: number.size > stack):  # many bands of few slices
        table, slice_ok = (of_all[which] for of_all in _build_table(codebook, layout.code_bits))
    else:
        table, slice_ok = _build_table(codebook[which], layout.code_bits)
    known = _layout.CODEBOOK_ID
    slice_ok &= jnp.all(header[:, :known] == _layout.pack_header(layout)[:known], axis=1)
    if exponents.shape[1] == 0:  # corrupt, but gathers need something to clamp to
        exponents = jnp.zeros((stack, 1), _U32)
    if bands:
        coded = _Coded(chunk_offsets, exponents, sign_mantissa)
        chunk, start, end, exponents, sign_mantissa = _take_bands(view, which, number % each, coded)
        view = view.band
    else:
        chunk = jnp.arange(view.chunks, dtype=_U32)
        start, end = chunk_offsets[which, :-1], chunk_offsets[which, 1:]
        exponents, sign_mantissa = exponents[which], sign_mantissa[which]
    steps = _steps_of_chunks(view)
    records = _read_records(start, end, exponents, steps)

    pairs, checksum = _decode_pairs(view, steps, table, records, exponents, sign_mantissa)
    weights, patches_checksum = _apply_patches(pairs, steps, records, exponents)
    checksum += patches_checksum + _mix(chunk + _U32(0x27D4EB2F))

    ok = slice_ok[:, None] & records.ok & (checksum == records.checksum)
    weights = jnp.where(ok[None, :, :, None, None, None, None], weights, jnp.uint16(0xFFFF))
    return _to_matrix(view, weights).reshape(shape)


def _build_table(
    codebook: UInt32[Array, "N 36"], most_bits: int
) -> tuple[UInt32[Array, "N 4096"], Bool[Array, " N"]]:
    """Table entries (both exponents in place, code length in bits 0..4), and which are valid."""
    shifts = jnp.arange(0, 32, 8, dtype=_U32)
    bytes_ = (codebook[:, :, None] >> shifts & 0xFF).reshape(codebook.shape[0], -1)
    exponent, packed = jnp.split(bytes_, [_layout.CODED_EXPONENTS], axis=1)
    length = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, _layout.SYMBOLS)

    # In a complete canonical code, a symbol takes 2^(12 - length) entries in a row.
    coded = (length > 0) & (length <= most_bits)
    entries = jnp.where(coded, _U32(_layout.TABLE_SIZE) >> length, 0)
    ok = jnp.all(length <= most_bits, axis=1)
    ok &= jnp.sum(entries, axis=1) == _layout.TABLE_SIZE

    symbols = jnp.argsort(jnp.where(coded, length, 16), axis=1, stable=True)
    ends = jnp.cumsum(jnp.take_along_axis(entries, symbols, axis=1), axis=1)
    # How many of them end at an entry, or before. (jnp.searchsorted, which counts that as well,
    # fails in a shard_map over some axes of a mesh.)
    counts = jnp.zeros((ends.shape[0], _layout.TABLE_SIZE), jnp.int32)
    slices = jnp.arange(ends.shape[0])[:, None]
    rank = jnp.cumsum(counts.at[slices, ends].add(1, mode="drop"), axis=1)
    symbol = jnp.take_along_axis(symbols, jnp.minimum(rank, _layout.SYMBOLS - 1), axis=1)
    first = jnp.take_along_axis(exponent, symbol // _layout.CODED_EXPONENTS, axis=1)
    second = jnp.take_along_axis(exponent, symbol % _layout.CODED_EXPONENTS, axis=1)
    table = first << 7 | second << 23 | jnp.take_along_axis(length, symbol, axis=1)
    return table[:, _BIT_REVERSED], ok


class _Coded(NamedTuple):
    """What is coded of all slices of a stack."""

    chunk_offsets: UInt32[Array, "stack C+1"]
    exponents: UInt32[Array, "stack W"]
    sign_mantissa: UInt32[Array, "stack quads"]


def _take_bands(
    view: View, which: Int32[Array, " N"], number: Int32[Array, " N"], coded: _Coded
) -> tuple[Array, Array, Array, Array, Array]:
    """Bands as if each were a slice, from which little more is copied than what they need.

    Args:
        view: the view of the slices.
        which: the slice of each band.
        number: the number of the band in its slice.
        coded: the stack.

    Returns:
        The number of each chunk in its slice; begin and end of its record, and the exponents in
        which that is; and sign_mantissa.
    """

    def gather(words: Array, at: UInt32[Array, "N ..."]) -> Array:
        at = jnp.minimum(at, _U32(words.shape[1] - 1)).astype(jnp.int32)
        slices = which.reshape(-1, *[1] * (at.ndim - 1))
        return words.at[slices, at].get(mode="promise_in_bounds")

    matrix, tile = (part.astype(_U32)[:, None] for part in jnp.divmod(number, view.tiles_n))
    row = np.arange(view.tiles_k, dtype=np.uint32)
    steps = _steps_of_chunks(view.band)
    chunk = (matrix * view.tiles_k + row) * view.tiles_n + tile
    begin, end = gather(coded.chunk_offsets, chunk), gather(coded.chunk_offsets, chunk + 1)
    # No record is longer than a raw one. Behind it, windows of streams read on.
    most = _layout.RAW_RECORD_HEADER_WORDS + _layout.STEP_WORDS * view.steps
    is_sound = (begin <= end) & (end <= coded.exponents.shape[1]) & (end - begin <= most)
    room = most + 2
    exponents = gather(coded.exponents, begin[..., None] + np.arange(room, dtype=np.uint32))
    start = jnp.broadcast_to(_U32(room) * row, chunk.shape)

    first_step = (matrix * view.steps_k + view.steps * row) * view.tiles_n + tile * steps
    at = [
        _layout.STEP_WORDS * first_step[:, i : i + 1]
        + np.arange(_layout.STEP_WORDS * int(count), dtype=np.uint32)
        for i, count in enumerate(steps)
    ]
    sign_mantissa = gather(coded.sign_mantissa, jnp.concatenate(at, axis=1))
    words = jnp.where(is_sound, end - begin, 0)
    return chunk, start, start + words, exponents.reshape(len(number), -1), sign_mantissa


class _Records(NamedTuple):
    """What the records' first words say; all the same shape but for `bits`."""

    ok: Bool[Array, "N C"]  # consistent, so far
    start: UInt32[Array, "N C"]  # word of `exponents`
    raw: Bool[Array, "N C"]
    bits: UInt32[Array, "N C T G"]  # where the lanes' streams start, counted from `start`
    patches: UInt32[Array, "N C"]  # how many; 0 where not ok
    first_patch: UInt32[Array, "N C"]  # word of `exponents`
    checksum: UInt32[Array, "N C"]


def _steps_of_chunks(view: View) -> UInt32[np.ndarray, " C"]:
    steps = np.minimum(view.steps_k - view.steps * np.arange(view.tiles_k), view.steps)
    return np.tile(np.repeat(steps, view.tiles_n), view.batch).astype(np.uint32)


def _gather(words: UInt32[Array, "N W"], at: UInt32[Array, "N ..."]) -> UInt32[Array, "N ..."]:
    """words[n, at[n, ...]], clamped."""
    at = jnp.minimum(at, _U32(words.shape[1] - 1)).astype(jnp.int32)
    flat = jnp.take_along_axis(words, at.reshape(at.shape[0], -1), axis=1, mode="promise_in_bounds")
    return flat.reshape(at.shape)


def _read_records(
    start: UInt32[Array, "N C"],
    end: UInt32[Array, "N C"],
    exponents: UInt32[Array, "N W"],
    steps: UInt32[np.ndarray, " C"],
) -> _Records:
    words = end - start
    ok = (start <= end) & (end <= exponents.shape[1])
    ok &= words >= _layout.RAW_RECORD_HEADER_WORDS
    head = _gather(
        exponents, start[..., None] + jnp.arange(_layout.RECORD_HEADER_WORDS, dtype=_U32)
    )
    checksum, counts, extra_words = head[..., 0], head[..., 1], head[..., 2:]

    extra = extra_words[..., None] >> jnp.arange(0, 32, 8, dtype=_U32) & 0xFF
    lane_bits = (counts >> 16)[..., None] + extra.reshape(*counts.shape, _layout.LANES)
    ends = jnp.cumsum(lane_bits, axis=-1, dtype=_U32)
    stream_words = (ends[..., -1] + 31) >> 5
    bits = 32 * _layout.RECORD_HEADER_WORDS + (ends - lane_bits)
    bits = bits.reshape(*counts.shape, 8, 4).swapaxes(-1, -2)

    patches = counts & 0xFFFF
    raw = patches == _layout.RAW_CHUNK
    patches = jnp.where(raw, 0, patches)
    coded_words = _layout.RECORD_HEADER_WORDS + stream_words + patches
    raw_words = _layout.RAW_RECORD_HEADER_WORDS + _layout.STEP_WORDS * steps
    ok &= words == jnp.where(raw, raw_words, coded_words)
    ok &= ~raw | (counts == _layout.RAW_CHUNK)
    return _Records(
        ok=ok,
        start=start,
        raw=raw,
        bits=bits,
        patches=jnp.where(ok, patches, 0),
        first_patch=start + _layout.RECORD_HEADER_WORDS + stream_words,
        checksum=checksum,
    )


def _decode_pairs(
    view: View,
    steps: UInt32[np.ndarray, " C"],
    table: UInt32[Array, "N 4096"],
    records: _Records,
    exponents: UInt32[Array, "N W"],
    sign_mantissa: UInt32[Array, "N quads"],
) -> tuple[UInt32[Array, "H N C T G J"], UInt32[Array, "N C"]]:
    """All pairs before patches, and the pairs' part of the checksums."""
    slices, chunks = records.start.shape
    half_steps = 2 * min(view.steps, view.steps_k)
    start = records.start[:, :, None, None]
    raw = records.raw[:, :, None, None]
    t, g = (jnp.arange(n, dtype=_U32) for n in (4, 8))
    quad = 4 * t[:, None] + 16 * g  # first of the lane's four words in a half-step
    words = np.append(0, np.cumsum(_layout.STEP_WORDS * steps.astype(np.int64)))
    sign_mantissa_start = jnp.asarray(words[:-1], _U32)

    def half_step(
        state: tuple[Array, Array], h: UInt32[Array, ""]
    ) -> tuple[tuple[Array, Array], UInt32[Array, "N C T G J"]]:
        bits, acc = state
        entries = []
        raw_word = start + _layout.RAW_RECORD_HEADER_WORDS + _layout.HALF_STEP_WORDS * h + quad
        for i in range(4):
            # Two codes, at most 24 bits, from one window of 32.
            at = jnp.where(raw, raw_word + i, start + (bits >> 5))
            word, following = _gather(exponents, at), _gather(exponents, at + 1)
            window = word >> (bits & 31) | following << 1 << (31 - (bits & 31))
            first = _gather(table, window & (_layout.TABLE_SIZE - 1))
            window >>= first & 31
            second = _gather(table, window & (_layout.TABLE_SIZE - 1))
            bits += (first & 31) + (second & 31)
            entries.append(jnp.where(raw, _raw_entry(word), first))
            entries.append(jnp.where(raw, _raw_entry(word >> 16), second))

        at = sign_mantissa_start[:, None, None, None] + _layout.HALF_STEP_WORDS * h
        at = at + (quad[..., None] + jnp.arange(4, dtype=_U32))
        low = _gather(sign_mantissa, jnp.broadcast_to(at, (slices, chunks, 4, 8, 4)))
        other = jnp.stack([low, _rotl(low, 8)], axis=-1).reshape(slices, chunks, 4, 8, 8)
        mask = _U32(_layout.SIGN_MANTISSA)
        pair = (jnp.stack(entries, axis=-1) & ~mask) | (other & mask)

        counts = (h < 2 * steps)[:, None, None, None]  # the last tile row may have fewer
        acc = jnp.where(counts, _rotl(acc * _U32(0x9E3779B1) + pair, 13), acc)
        return (bits, acc), pair

    # Zeros made of the payload: in a shard_map, a loop's state must start as it goes on, namely
    # different from device to device.
    acc = jnp.zeros_like(records.bits[..., None], shape=(slices, chunks, 4, 8, 8))
    (_, acc), pairs = jax.lax.scan(
        half_step, (records.bits, acc), jnp.arange(half_steps, dtype=_U32)
    )
    place = 64 * t[:, None, None] + jnp.arange(64, dtype=_U32).reshape(8, 8)
    checksum = jnp.sum(_mix(acc + _U32(0x85EBCA6B) * place), axis=(2, 3, 4), dtype=_U32)
    return pairs, checksum


def _apply_patches(
    pairs: UInt32[Array, "H N C T G J"],
    steps: UInt32[np.ndarray, " C"],
    records: _Records,
    exponents: UInt32[Array, "N W"],
) -> tuple[UInt16[Array, "H N C T G J 2"], UInt32[Array, "N C"]]:
    """The weights, and the patches' part of the checksums."""
    weights = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
    slices, chunks = records.start.shape
    n, c = jnp.arange(slices)[:, None], jnp.arange(chunks)

    def patch_all_chunks(
        i: Int32[Array, ""], state: tuple[Array, Array]
    ) -> tuple[UInt16[Array, "H N C T G J 2"], UInt32[Array, "N C"]]:
        weights, checksum = state
        i = jnp.asarray(i, _U32)
        patch = _gather(exponents, records.first_patch + i)
        active = i < records.patches
        row, col = patch >> 22, patch >> 16 & 63
        h = row >> 3 & ~_U32(1) | row >> 1 & 1  # 2 * step + half-step
        # What is not to be written goes out of bounds, where scatters drop it.
        h = jnp.where(active & (row < _layout.STEP_ROWS * steps), h, _U32(weights.shape[0]))
        at = weights.at[h, n, c, row >> 2 & 3, col >> 3, col & 7, row & 1]
        weights = at.set(patch.astype(jnp.uint16), mode="drop")
        return weights, checksum + jnp.where(active, _mix(patch + _U32(0xC2B2AE35)), 0)

    count = jnp.max(records.patches).astype(jnp.int32)
    state = (weights, jnp.zeros_like(records.patches))
    return jax.lax.fori_loop(0, count, patch_all_chunks, state)


def _to_matrix(view: View, weights: UInt16[Array, "H N C T G J 2"]) -> BFloat16[Array, "N size"]:
    half_steps, slices = weights.shape[:2]
    tiles = weights.reshape(
        half_steps // 2, 2, slices, view.batch, view.tiles_k, view.tiles_n, 4, 8, 8, 2
    )
    # k is 16 step + 4 t + 2 half-step + which of the pair, n is 8 g + j, of a tile.
    matrix = tiles.transpose(2, 3, 4, 0, 6, 1, 9, 5, 7, 8)
    matrix = matrix.reshape(slices, view.batch, -1, view.tiles_n * _layout.TILE_COLS)
    matrix = matrix[:, :, : view.k, : view.n]
    if view.along_columns:
        matrix = matrix.swapaxes(2, 3)
    matrix = matrix.reshape(slices, -1)[:, : view.size]
    return jax.lax.bitcast_convert_type(matrix, jnp.bfloat16)


def _raw_entry(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    return (word & 0xFF) << 7 | (word & 0xFF00) << 15


def _rotl(x: UInt32[Array, "..."], n: int) -> UInt32[Array, "..."]:
    return x << n | x >> (32 - n)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x ^= x >> 16
    x *= _U32(0x7FEB352D)
    return x ^ x >> 15
