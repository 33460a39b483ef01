"""CRC-32 of leaves, wherever their parts are.

The checksum of a leaf is `zlib.crc32` over the bytes of its arrays, one array after the other, each
in row-major order: it does not depend on how the arrays are sharded, and anyone can recompute it.
Each part is read on its own device, since the CRCs of parts of a message add up: as polynomials
modulo 2, crc(a + b) = crc(a) * x^(8 * len(b)) + crc(b).
"""

import functools
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from df11_jax._exchange import gather
from df11_jax._host_arrays import as_bytes, to_host

_POLYNOMIAL = 0xEDB88320  # of CRC-32; bit 31 is the coefficient of x^0
_ONE = 1 << 31
_X_TO_8 = 1 << 23


def leaf_checksums(leaves: Sequence[Sequence[Any]]) -> list[int]:
    """The checksums of leaves.

    If leaves are spread over several processes, all of these must call this with the same leaves.

    Args:
        leaves: the arrays of each leaf, on devices or on the host.

    Returns:
        The CRC-32 of each leaf.
    """
    spread = [array for leaf in leaves for array in leaf if not _is_local(array)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = _sum_over_processes(spread, list(pool.map(_own_part, spread))) if spread else []
        known = {id(array): part for array, part in zip(spread, parts, strict=True)}

        def checksum(leaf: Sequence[Any]) -> int:
            sum_so_far = 0
            for array in leaf:
                whole = _whole(array)
                if whole is not None:
                    sum_so_far = zlib.crc32(as_bytes(whole).data, sum_so_far)
                else:
                    part = known[id(array)] if id(array) in known else _own_part(array)
                    sum_so_far = _followed_by(sum_so_far, _nbytes(array)) ^ part
            return sum_so_far

        return list(pool.map(checksum, leaves))


def host_checksum(arrays: Iterable[np.ndarray]) -> int:
    """The checksum of a leaf whose arrays are on the host."""
    return functools.reduce(
        lambda sum_so_far, a: zlib.crc32(as_bytes(a).data, sum_so_far), arrays, 0
    )


def _whole(array: Any) -> np.ndarray | None:
    """The array on the host; None if it is in several parts."""
    in_one_part = not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1
    return to_host(array) if in_one_part and _is_local(array) else None


def _own_part(array: jax.Array) -> int:
    """The part of an array's checksum that comes from the first replicas on this process."""
    part = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            part ^= _checksum_within(to_host(shard.data), shard.index, array.shape)
    return part


def _checksum_within(block: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The part of an array's checksum that comes from its block at `index`."""
    if not block.size:
        return 0
    if block.shape[1:] == shape[1:]:
        checksum = zlib.crc32(as_bytes(block).data)
    else:
        checksum = 0
        row = math.prod(shape[1:]) * block.itemsize
        for part in block:
            checksum = _followed_by(checksum, row) ^ _checksum_within(part, index[1:], shape[1:])
    if not shape:
        return checksum
    rows_after = shape[0] - index[0].indices(shape[0])[1]
    return _followed_by(checksum, rows_after * math.prod(shape[1:]) * block.itemsize)


def _followed_by(checksum: int, nbytes: int) -> int:
    """The part of a message's checksum that comes from its start, `nbytes` before its end."""
    return _product(checksum, _power_of_x(nbytes)) if checksum and nbytes else checksum


def _product(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(1024)
def _power_of_x(nbytes: int) -> int:
    """The polynomial x^(8 * nbytes)."""
    power = _ONE
    for bit in range(nbytes.bit_length()):
        if nbytes >> bit & 1:
            power = _product(_square_chain(bit), power)
    return power


@functools.cache
def _square_chain(n: int) -> int:
    """The polynomial x^(8 * 2^n)."""
    return _X_TO_8 if n == 0 else _product(_square_chain(n - 1), _square_chain(n - 1))


def _sum_over_processes(arrays: Sequence[Any], parts: Sequence[int]) -> list[int]:
    """The sums of the parts that all processes with shards of the arrays have found."""
    devices = set().union(*(array.sharding.device_set for array in arrays))
    found = gather(np.array(parts, np.uint32), devices)
    return [int(part) for part in np.bitwise_xor.reduce(list(found.values()), axis=0)]


def _is_local(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _nbytes(array: jax.Array) -> int:
    return array.size * np.dtype(array.dtype).itemsize
