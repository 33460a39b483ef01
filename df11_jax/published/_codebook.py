"""The code of a published unit: from counts of exponents to codes and look-up tables.

Everything here is a few hundred entries, once for each unit.
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

# Fills up the last byte of a stream. It counts as the smallest of symbols, and occurs once.
END = -1


class Leaf(NamedTuple):
    """A symbol and its code.

    Attributes:
        symbol: an exponent, or `END`.
        length: of the code, in bits.
        bits: the code; its first bit is the highest of `length`.
    """

    symbol: int
    length: int
    bits: int


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A code as the encoder needs it, and as a file holds it.

    Attributes:
        bits: the code of each exponent; its first bit is the highest of `lengths`.
        lengths: of the codes; 0 for exponents without one.
        end: the end symbol's code.
        luts: the look-up tables, and `lengths` as their last row.
    """

    bits: UInt32[np.ndarray, "256"]
    lengths: UInt8[np.ndarray, "256"]
    end: Leaf
    luts: UInt8[np.ndarray, "rows_and_lengths 256"]


def build_codebook(counts: Int[np.ndarray, "256"]) -> Codebook:
    """The code for exponents that occur as often as this: the one that the reference would use.

    Args:
        counts: how often each exponent occurs.

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


def _limited_code(symbols: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> list[Leaf]:
    """A code of at most 32 bits.

    While one is longer, the 2, 3, ... least frequent exponents are taken to occur once. Where
    counts are equal at that limit, the reference leaves it to `numpy.argpartition` which ones are
    taken, so that this does the same; numpy may choose others on another processor.
    """
    leaves = _huffman_code(symbols, counts)
    rarest = 2
    while max(leaf.length for leaf in leaves) > MAX_CODE_BITS:
        smoothed = counts.copy()
        smoothed[np.argpartition(counts, rarest)[:rarest]] = 1
        leaves = _huffman_code(symbols, smoothed)
        rarest += 1
    return leaves


def _huffman_code(symbols: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> list[Leaf]:
    """The code with the end symbol added, in the order of the tree's leaves."""
    # Each node: its count, its first symbol (which decides between equal counts), its leaves.
    nodes = [
        (count, symbol, [Leaf(symbol, 0, 0)])
        for symbol, count in zip(symbols.tolist(), counts.tolist(), strict=True)
    ]
    nodes.append((1, END, [Leaf(END, 0, 0)]))
    heapq.heapify(nodes)
    while len(nodes) > 1:
        low_count, first, low = heapq.heappop(nodes)
        high_count, _, high = heapq.heappop(nodes)
        merged = [Leaf(s, length + 1, bits) for s, length, bits in low]
        merged += [Leaf(s, length + 1, bits | 1 << length) for s, length, bits in high]
        heapq.heappush(nodes, (low_count + high_count, first, merged))
    return nodes[0][2]


def _build_tables(leaves: list[Leaf]) -> UInt8[np.ndarray, "rows 256"]:
    """One row for each string of whole bytes that codes go on after."""
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

    # What no code writes repeats the entry before, also across rows. At the very beginning, where
    # the reference fails, it repeats the entry after: a decoder that runs past the stream's end,
    # where all bits are 0, then finds a code there, and not one of 0 bits that it could never pass.
    tables = np.empty(len(rows) * ROW_ENTRIES, np.uint8)
    value = written[min(written)]
    for at in range(len(tables)):
        value = written.get(at, value)
        tables[at] = value
    return tables.reshape(-1, ROW_ENTRIES)


def _whole_bytes(code: str) -> int:
    """Bits of a code before its last byte, whole or not."""
    return (len(code) - 1) // 8 * 8


def _entry(rows: dict[str, int], prefix: str, byte: str) -> int:
    """Where in all tables a byte after a prefix is looked up."""
    return rows[prefix] * ROW_ENTRIES + int(byte, 2)
