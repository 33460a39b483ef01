"""The code of a published unit: from counts of exponents to codes and look-up tables.

All tables here have a few hundred entries and are made once for each unit.
"""

import dataclasses
import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt32

MAX_CODE_BITS = 32
ROW_ENTRIES = 256
FIRST_POINTER = 240  # entries of tables from here on are no exponents
MAX_ROWS = ROW_ENTRIES - FIRST_POINTER + 1

# The symbol whose code fills up the last byte of a stream. It sorts before all others, and occurs
# once.
END = -1


class Codeword(NamedTuple):
    """The codeword of a symbol.

    Attributes:
        symbol: an exponent, or `END`.
        length: the length of the codeword, in bits.
        bits: the bits of the codeword; its first bit is the highest of `length`.
    """

    symbol: int
    length: int
    bits: int


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A code as the encoder needs it, and as a file holds it.

    Attributes:
        bits: the codeword of each exponent; its first bit is the highest of `lengths`.
        lengths: the lengths of the codewords; 0 for exponents without one.
        end: the end symbol's codeword.
        luts: the look-up tables, and `lengths` as their last row.
    """

    bits: UInt32[np.ndarray, "256"]
    lengths: UInt8[np.ndarray, "256"]
    end: Codeword
    luts: UInt8[np.ndarray, "rows_and_lengths 256"]


def build_codebook(counts: Int[np.ndarray, "256"]) -> Codebook:
    """Builds the code that the reference would use for exponents with these counts.

    Args:
        counts: the number of occurrences of each exponent.

    Raises:
        ValueError: an exponent occurs that the layout cannot hold, none occurs, or the code needs
            more look-up tables than can be pointed to.
    """
    symbols = np.flatnonzero(counts)
    if len(symbols) == 0 or symbols[-1] >= FIRST_POINTER:
        raise ValueError(
            f"a code needs exponents, all below {FIRST_POINTER}, got {symbols.tolist()}"
        )
    leaves = _limited_code(symbols, np.asarray(counts)[symbols].astype(np.int64))
    bits, lengths = np.zeros(ROW_ENTRIES, np.uint32), np.zeros(ROW_ENTRIES, np.uint8)
    for leaf in leaves:
        if leaf.symbol != END:
            bits[leaf.symbol], lengths[leaf.symbol] = leaf.bits, leaf.length
    (end,) = (leaf for leaf in leaves if leaf.symbol == END)
    luts = np.concatenate([_build_tables(leaves), lengths[None]])
    return Codebook(bits=bits, lengths=lengths, end=end, luts=luts)


def _limited_code(symbols: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> list[Codeword]:
    """Builds a code of at most 32 bits.

    While a code is longer, the 2, 3, ... least frequent exponents are taken to occur once. If
    counts are equal at that limit, the reference lets `numpy.argpartition` choose among them, and
    so does this; numpy may choose others on another processor.
    """
    leaves = _huffman_code(symbols, counts)
    rarest = 2
    while max(leaf.length for leaf in leaves) > MAX_CODE_BITS:
        smoothed = counts.copy()
        smoothed[np.argpartition(counts, rarest)[:rarest]] = 1
        leaves = _huffman_code(symbols, smoothed)
        rarest += 1
    return leaves


def _huffman_code(symbols: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> list[Codeword]:
    """The code with the end symbol added, in the order of the tree's leaves."""
    # Each node: its count, its first symbol (which decides between equal counts), its leaves.
    nodes = [
        (count, symbol, [Codeword(symbol, 0, 0)])
        for symbol, count in zip(symbols.tolist(), counts.tolist(), strict=True)
    ]
    nodes.append((1, END, [Codeword(END, 0, 0)]))
    heapq.heapify(nodes)
    while len(nodes) > 1:
        low_count, first, low = heapq.heappop(nodes)
        high_count, _, high = heapq.heappop(nodes)
        merged = [Codeword(s, length + 1, bits) for s, length, bits in low]
        merged += [Codeword(s, length + 1, bits | 1 << length) for s, length, bits in high]
        heapq.heappush(nodes, (low_count + high_count, first, merged))
    return nodes[0][2]


def _build_tables(leaves: list[Codeword]) -> UInt8[np.ndarray, "rows 256"]:
    """Builds the look-up tables: a row for each string of whole bytes that begins a longer code."""
    codes = {leaf.symbol: f"{leaf.bits:0{leaf.length}b}" for leaf in leaves if leaf.symbol != END}
    prefixes = dict.fromkeys(["", *(code[: _whole_bytes(code)] for code in codes.values())])
    rows = {prefix: row for row, prefix in enumerate(sorted(prefixes, key=len))}
    if len(rows) > MAX_ROWS:
        raise ValueError(
            f"the code needs {len(rows)} look-up tables, and only {MAX_ROWS} can be pointed to"
        )
    written: dict[int, int] = {}
    for symbol, code in codes.items():
        last = _whole_bytes(code)
        written[_entry(rows, code[:last], code[last:].ljust(8, "0"))] = symbol
        for at in range(0, last, 8):
            row = rows[code[: at + 8]]
            written[_entry(rows, code[:at], code[at : at + 8])] = ROW_ENTRIES - row

    # Entries that no code reaches repeat the entry before, also across rows. At the very beginning,
    # where the reference fails, they repeat the entry after. A decoder that runs past the end of
    # the stream, where all bits are 0, then finds a code there, and not one of 0 bits, at which it
    # would stay for ever.
    tables = np.empty(len(rows) * ROW_ENTRIES, np.uint8)
    value = written[min(written)]
    for at in range(len(tables)):
        value = written.get(at, value)
        tables[at] = value
    return tables.reshape(-1, ROW_ENTRIES)


def _whole_bytes(code: str) -> int:
    """The number of bits of a code before its last byte, which may be incomplete."""
    return (len(code) - 1) // 8 * 8


def _entry(rows: dict[str, int], prefix: str, byte: str) -> int:
    """The index in all tables at which a byte after a prefix is looked up."""
    return rows[prefix] * ROW_ENTRIES + int(byte, 2)
