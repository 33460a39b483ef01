"""A slow encoder written from docs/format.md alone, to check the decoders against.

It shares no code with the package. Options make it produce what the real encoder seldom does.
"""

import heapq
from collections import Counter

import numpy as np

_M32 = 0xFFFFFFFF


def _rotl(x, n):
    return ((x << n) | (x >> (32 - n))) & _M32


def _mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & _M32
    return x ^ x >> 15


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _matrices(weights, batch_axes, row_axes, along_columns):
    """The slice as [batch, k, n], padded with zeros to whole steps."""
    shape, size = weights.shape, weights.size
    end = batch_axes + row_axes
    batch = int(np.prod(shape[:batch_axes], dtype=np.int64))
    rows = int(np.prod(shape[batch_axes:end], dtype=np.int64))
    cols = int(np.prod(shape[end:], dtype=np.int64))
    if row_axes and end < len(shape) and size and cols % 8 == 0:
        matrices = weights.reshape(batch, rows, cols)
        if along_columns:
            matrices = matrices.swapaxes(1, 2)
        _, k, n = matrices.shape
        padded = batch * _round_up(k, 16) * _round_up(n, 64)
        if 32 * (padded - size) <= size:
            return np.pad(matrices, ((0, 0), (0, -k % 16), (0, -n % 64)))
    flat = np.zeros(_round_up(size, 1024), np.uint16)
    flat[:size] = weights.reshape(-1)
    return flat.reshape(1, -1, 64)


def _header(shape, batch_axes, row_axes, along_columns, steps, code_bits, book):
    header = [0] * 28
    header[0] = 2
    header[1] = len(shape) | batch_axes << 8 | row_axes << 16 | int(along_columns) << 24
    header[2] = steps | code_bits << 8
    for i, dim in enumerate(shape):
        header[4 + 2 * i] = dim & _M32
        header[5 + 2 * i] = dim >> 32
    acc = 0
    for word in (*header[:3], *header[4:24]):
        acc = _rotl(acc * 0x9E3779B1 + word & _M32, 13)
    header[3] = _mix(acc)
    fnv = 0xCBF29CE484222325
    for byte in book.tobytes():
        fnv = (fnv ^ byte) * 0x100000001B3 & 2**64 - 1
    header[24:26] = fnv & _M32, fnv >> 32
    return np.array(header, np.uint32)


def _code_lengths(counts, most):
    """Huffman code lengths of at most `most` bits, by flattening the counts until they fit."""
    while True:
        heap = [(n, i, [s]) for i, (s, n) in enumerate(sorted(counts.items()))]
        lengths = Counter()
        heapq.heapify(heap)
        for tie in range(len(heap), 2 * len(heap) - 1):
            (n, _, a), (m, _, b) = heapq.heappop(heap), heapq.heappop(heap)
            lengths.update(a + b)
            heapq.heappush(heap, (n + m, tie, a + b))
        if max(lengths.values()) <= most:
            return lengths
        counts = {s: n // 2 + 1 for s, n in counts.items()}


def _canonical(lengths):
    """Symbol -> code, bit-reversed, first bit lowest."""
    codes, value, last = {}, 0, 0
    for length, symbol in sorted((n, s) for s, n in lengths.items()):
        value <<= length - last
        codes[symbol] = int(f"{value:0{length}b}"[::-1], 2)
        value, last = value + 1, length
    return codes


def encode(
    weights,
    coded=16,
    raw_chunks=(),
    drop=0.0,
    batch_axes=0,
    row_axes=None,
    along_columns=False,
    steps=8,
    code_bits=12,
):
    """Encodes one slice.

    Args:
        weights: uint16 array of any shape.
        coded: the number of exponents that get codes.
        raw_chunks: the chunks to store raw.
        drop: the fraction of the pairs of exponents, the rarest, that get no code.
        batch_axes: a field of the header, like those that follow.
        row_axes: None for all axes between the batch axes and the last one.
        along_columns: the order of pairs.
        steps: the number of steps of a chunk.
        code_bits: the bits of the longest code.

    Returns:
        header, codebook, chunk_offsets, exponents, sign_mantissa.
    """
    shape = weights.shape
    if row_axes is None:
        row_axes = max(0, len(shape) - batch_axes - 1)
    matrices = _matrices(weights, batch_axes, row_axes, along_columns)

    exponent = (matrices >> 7 & 0xFF).astype(int)
    top = [e for e, _ in Counter(exponent.reshape(-1).tolist()).most_common(coded)]
    number = {e: i for i, e in enumerate(top)}
    low, high = exponent[:, 0::2].reshape(-1).tolist(), exponent[:, 1::2].reshape(-1).tolist()
    pairs = Counter(
        16 * number[a] + number[b]
        for a, b in zip(low, high, strict=True)
        if a in number and b in number
    )
    kept = dict(pairs.most_common(max(1, round(len(pairs) * (1 - drop)))))
    for symbol in range(256):  # a complete code has at least two symbols
        if len(kept) >= 2:
            break
        kept.setdefault(symbol, 1)
    lengths = _code_lengths(kept, code_bits)
    codes = _canonical(lengths)
    book = np.zeros(144, np.uint8)
    book[: len(top)] = top
    for symbol, length in lengths.items():
        book[16 + symbol // 2] |= length << 4 * (symbol % 2)

    words, offsets, sign_mantissa = [], [0], []
    stand_in = next(iter(codes))
    exponents_of = np.array(top + [0] * (16 - len(top)))
    tiles = [
        matrix[k : k + 16 * steps, n : n + 64]
        for matrix in matrices
        for k in range(0, matrix.shape[0], 16 * steps)
        for n in range(0, matrix.shape[1], 64)
    ]
    for chunk, tile in enumerate(tiles):
        # [step, t, half-step, k, n] -> [half-step of the chunk, t, n, k]
        grid = tile.reshape(-1, 4, 2, 2, 64).transpose(0, 2, 1, 4, 3).reshape(-1, 4, 64, 2)
        grid = grid.astype(np.int64)
        bits = grid & 0x807F
        bits = bits[..., 0] | bits[..., 1] << 16
        b = bits[..., 1::2]
        # [half-step, t, g, word] -> lane after lane, 4 g + t
        quads = (bits[..., 0::2] | b >> 8 | b << 24 & _M32).reshape(-1, 4, 8, 4)
        sign_mantissa.append(quads.swapaxes(1, 2).reshape(-1))

        raw = chunk in raw_chunks
        streams, patches = [], []
        decoded = grid[..., 0] | grid[..., 1] << 16
        for lane in range(0 if raw else 32):
            g, t = divmod(lane, 4)
            stream, used = 0, 0
            for h in range(len(grid)):
                for col in range(8 * g, 8 * g + 8):
                    pair = (grid[h, t, col] >> 7 & 0xFF).tolist()
                    symbol = 16 * number.get(pair[0], 999) + number.get(pair[1], 999)
                    if symbol not in codes:
                        for k in (0, 1):
                            row = h // 2 * 16 + 4 * t + h % 2 * 2 + k
                            patches.append((row * 64 + col) << 16 | int(grid[h, t, col, k]))
                        symbol = stand_in
                        fake = exponents_of[symbol // 16] << 7 | exponents_of[symbol % 16] << 23
                        decoded[h, t, col] = decoded[h, t, col] & 0x807F807F | fake
                    stream |= codes[symbol] << used
                    used += lengths[symbol]
            streams.append((stream, used))

        checksum = _mix(chunk + 0x27D4EB2F & _M32)
        for place in range(256):
            acc = 0
            for w in decoded[:, place // 64, place % 64].tolist():
                acc = _rotl(acc * 0x9E3779B1 + w & _M32, 13)
            checksum += _mix(acc + 0x85EBCA6B * place & _M32)
        checksum += sum(_mix(patch + 0xC2B2AE35 & _M32) for patch in patches)

        if raw:
            e = (grid >> 7 & 0xFF).reshape(-1, 4, 8, 16).swapaxes(1, 2).astype(np.uint8)
            e = np.ascontiguousarray(e).reshape(-1, 4)
            record = [checksum & _M32, 0xFFFF, *e.view(np.uint32).reshape(-1).tolist()]
        else:
            base = max(max(n for _, n in streams) - 255, min(n for _, n in streams))
            extra = np.array([max(n - base, 0) for _, n in streams], np.uint8)
            record = [checksum & _M32, len(patches) | base << 16, *extra.view(np.uint32).tolist()]
            stream, used = 0, 0
            for (bits, _), more in zip(streams, extra.tolist(), strict=True):
                stream |= bits << used
                used += base + more
            record += [stream >> 32 * i & _M32 for i in range(-(-used // 32))] + patches
        words += record
        offsets.append(len(words))
    words += [0] * (-len(words) % 4)
    empty = np.zeros(0, np.uint32)
    return (
        _header(shape, batch_axes, row_axes, along_columns, steps, code_bits, book),
        book.view(np.uint32),
        np.array(offsets, np.uint32),
        np.array(words, np.uint32),
        np.concatenate([empty, *sign_mantissa]).astype(np.uint32),
    )


def encode_stack(weights, stack_ndim, **options):
    """Encodes a stack: all five arrays get the leading `stack_ndim` axes of `weights`."""
    stack, shape = weights.shape[:stack_ndim], weights.shape[stack_ndim:]
    slices = [encode(w, **options) for w in weights.reshape(-1, *shape)]
    longest = max(len(s[3]) for s in slices)
    slices = [(*s[:3], np.pad(s[3], (0, longest - len(s[3]))), s[4]) for s in slices]
    return tuple(np.stack(a).reshape(*stack, -1) for a in zip(*slices, strict=True))
