"""Units to encode, the same on every machine: for the tests, and for make_fixtures.py.

Nothing here depends on rounding, or on a random generator that may change.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

# Exponents of unequal frequency, in 65,536ths: those of a code with lengths of 2 to 12 bits.
_SKEWED = {100: 19660, 101: 13107, 102: 13107, 103: 6553, 110: 6553, 111: 2621, 112: 1966}
_SKEWED |= {120: 1310, 130: 622, 131: 37}

# How many of them, and then once the last, make a stream that ends in a special place. Found by
# trying; test_unit.py checks that it does.
ENDS = {
    "with a block": 12182,
    "with a window": 5045,
    "with a byte, the last code in two blocks": 48647,
    "with a byte, the last code in two windows": 5000,
    "in a byte, the last code in two blocks": 12183,
}


def cases() -> dict[str, list[np.ndarray]]:
    """The tensors of each unit, as bits."""
    units = {f"normal {size}": [normal(size)] for size in (1, 2, 3, 10, 100, 12345, 40000)}
    units["several tensors"] = [normal(20000), normal(0), normal(1), normal(13000, "more")]
    for name, size in ENDS.items():
        units[f"ends {name}"] = [skewed(size)]
    for count in (1, 2, 3, 4, 240):
        exponents = random_bytes(5000, f"even {count}").astype(np.int64) * count // 256
        units[f"{count} exponents"] = [with_exponents(exponents)]
    units["equal pair"] = [with_exponents(np.arange(1000) % 2 + 126)]
    # The frequencies halve, so that codes are up to ten bits longer than the table of eleven.
    zeros = np.unpackbits(random_bytes(3 * 100000, "halving").reshape(-1, 3), axis=1).argmax(axis=1)
    units["halving"] = [with_exponents(100 + zeros)]
    units["code of over 32 bits"] = [with_counts(dict(enumerate(fibonacci(33), 60)))]
    return units


def counts() -> dict[str, dict[int, int]]:
    """Counts of exponents to make codes for."""
    made = {f"fibonacci {n}": dict(enumerate(fibonacci(n), 90)) for n in (3, 20, 32, 33, 40, 70)}
    # Not in the order of the exponents.
    made["shuffled fibonacci"] = {(7 * i) % 61 + 90: n for i, n in enumerate(fibonacci(60))}
    made["powers"] = {100 + i: 3**i for i in range(36)}
    made["equal"] = dict.fromkeys(range(240), 5)
    made["nearly equal"] = {e: 100 + e for e in range(200)}
    made["one frequent"] = dict.fromkeys(range(30), 1) | {30: 10**6}
    for i in range(20):
        draws = random_bytes(512, f"counts {i}").astype(np.int64)
        used = np.flatnonzero(draws[:240] < 40 + 10 * i)
        made[f"drawn {i}"] = {int(e): 1 + int(draws[256 + e]) ** (1 + i % 3) for e in used}
    return made


def digest(array: np.ndarray | None) -> str | None:
    """What fixtures have in the place of an array."""
    if array is None:
        return None
    content = f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
    return hashlib.sha256(content).hexdigest()


def normal(size: int, seed: str = "normal") -> np.ndarray:
    """Weights that are distributed nearly as normal ones, with a deviation of 0.025."""
    draws = random_bytes(8 * size, seed).reshape(-1, 8).astype(np.int32).sum(axis=1)
    # Integers this small, and their products with a power of two, are exact.
    values = (2 * draws - 8 * 255).astype(np.float32) * np.float32(2.0**-14)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def skewed(size: int) -> np.ndarray:
    draws = random_bytes(2 * size, "skewed").view("<u2")
    limits = np.cumsum(list(_SKEWED.values()))
    drawn = np.array([*_SKEWED])[np.searchsorted(limits, draws, side="right")]
    return with_exponents(np.append(drawn, max(_SKEWED)))


def with_counts(counts: Mapping[int, int]) -> np.ndarray:
    """Weights whose exponents occur this often, well mixed."""
    exponents = np.repeat(list(counts.keys()), list(counts.values()))
    step = int(0.618 * len(exponents))
    while np.gcd(step, len(exponents)) != 1:
        step += 1
    return with_exponents(exponents[np.arange(len(exponents)) * step % len(exponents)])


def with_exponents(exponents: Sequence[int] | np.ndarray) -> np.ndarray:
    """Weights with these exponents, and any signs and mantissas."""
    other = random_bytes(len(exponents), "signs and mantissas").astype(np.uint16)
    return (other & 0x80) << 8 | np.asarray(exponents).astype(np.uint16) << 7 | other & 0x7F


def random_bytes(count: int, seed: str) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(seed.encode()).digest(count), np.uint8)


def fibonacci(length: int) -> list[int]:
    numbers = [1, 1]
    while len(numbers) < length:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:length]
