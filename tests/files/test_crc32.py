import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from df11_jax._files import crc32


def crc(*arrays):
    return zlib.crc32(b"".join(np.asarray(array).tobytes() for array in arrays))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (2, 0, 3)])
@pytest.mark.parametrize("dtype", ["uint32", "bfloat16", "uint8", "bool", "int4"])
def test_is_that_of_zlib(shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(jnp.dtype(dtype))
    assert crc32.leaf_checksums([[array]]) == [crc(array)]
    assert crc32.leaf_checksums([[jnp.asarray(array)]]) == [crc(array)]
    assert crc32.host_checksum([array, array]) == crc(array, array)


def test_goes_on_from_array_to_array():
    a, b, empty = np.arange(5, dtype=np.uint32), np.ones((2, 3)), np.zeros((0, 3))
    leaves = [[a, b], [], [b], [empty, a, empty, b, a]]
    assert crc32.leaf_checksums(leaves) == [crc(*leaf) for leaf in leaves]


def test_non_contiguous_array():
    array = np.arange(60, dtype=np.uint32).reshape(6, 10)[::2, 1::3]
    assert crc32.leaf_checksums([[array]]) == [crc(array)]


@pytest.mark.parametrize("shape", [(4,), (2, 6), (6, 2), (2, 4, 6)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_does_not_depend_on_sharding(shape, axis):
    array = np.random.default_rng(0).integers(2**32, size=shape, dtype=np.uint32)
    spec = [None] * len(shape)
    if axis is not None:
        spec[axis] = "x"
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert crc32.leaf_checksums([[sharded, array]]) == [crc(array, array)]


@settings(deadline=None)
@given(st.data())
def test_blocks_add_up(data):
    """Whatever grid an array is cut along, the blocks' parts sum up to the whole's checksum."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    array = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    cuts = [
        [0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else ()), n]
        for n in shape
    ]
    total = 0
    for corner in np.ndindex(*(len(cut) - 1 for cut in cuts)):
        index = tuple(slice(cut[i], cut[i + 1]) for cut, i in zip(cuts, corner, strict=True))
        total ^= crc32._checksum_within(array[index], index, shape)
    assert total == crc(array)


@given(st.binary(max_size=50), st.binary(max_size=50), st.integers(0, 2**40))
def test_concatenation(a, b, many):
    followed = crc32._followed_by(zlib.crc32(a), len(b))
    assert followed ^ zlib.crc32(b) == zlib.crc32(a + b)
    # Long distances, of which no test can have the bytes: distances add up.
    once = crc32._followed_by(zlib.crc32(a), many + len(b))
    assert once == crc32._followed_by(followed, many)
