"""Runs the kernels as nvcc compiles them, on a simulated device that finds races; needs no GPU."""

import ctypes
import dataclasses
import itertools
import math
import re

import count_sass
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import needs_nvcc
from device_memory import GlobalMemory, KernelError
from kernel_arguments import (
    RNG,
    UNWRITTEN,
    TensorSlices,
    compile_ptx,
    compressed,
    damaged,
    every_pattern,
    fill_tensor,
    sprinkled,
    to_bits,
    unnoticed,
)
from payloads import random_weights
from ptx_kernel import read_kernel
from ptx_machine import launch

import df11_jax
from df11_jax import _layout, _xla_decoder, published

pytestmark = [needs_nvcc, pytest.mark.slow]

THREADS = 256
GROUPS_THREADS = 64  # of a kernel for groups of chunks with two warps


class DecodeBatch(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int),
        ("first_chunk", ctypes.c_int64 * 18),
        ("tensors", TensorSlices * 17),
    ]


class TensorMap(ctypes.Structure):  # as ptx_bulk.py reads it
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("base", "tiles", "rows", "pitch", "box_tiles")),
        ("rest", ctypes.c_uint64 * 11),
    ]


class BulkBatch(ctypes.Structure):
    _fields_ = [
        ("maps", TensorMap * 11),
        ("tensors", TensorSlices * 11),
        ("first_block", ctypes.c_uint32 * 12),
        ("first_single", ctypes.c_uint32 * 12),
        ("count", ctypes.c_int),
        ("zero", ctypes.c_uint32),
        ("rest", ctypes.c_int * 8),  # to a multiple of 64 bytes
    ]


class Unit(ctypes.Structure):
    ARRAYS = ("sign_mantissa", "encoded_exponent", "luts", "output_positions", "gaps")
    _fields_ = [
        *((name, ctypes.c_uint64) for name in (*ARRAYS, "out")),
        *((name, ctypes.c_int64) for name in ("size", "encoded_bytes", "blocks", "positions")),
        ("rows", ctypes.c_int),
    ]


# Before 8.0, copies are not asynchronous, and sums over a warp are made of shuffles.
@pytest.fixture(scope="module", params=["75", "90"])
def native_ptx(tmp_path_factory, request):
    return compile_ptx(tmp_path_factory.mktemp("native"), count_sass.SOURCE, request.param)


@pytest.fixture(scope="module", params=count_sass.BULK_CHUNKS)
def groups(tmp_path_factory, request):
    """The PTX, and the number of chunks in a group."""
    source = count_sass.bulk_source(request.param, 2)
    size = "__constant__ unsigned kBulkBytes = df11::native::BulkMemory<2>::kEnd;"
    ptx = compile_ptx(tmp_path_factory.mktemp("groups"), f"{source}\n{size}\n")
    return ptx, request.param


@pytest.fixture(scope="module")
def published_ptx(tmp_path_factory):
    size = "__constant__ unsigned kBlockStateBytes = sizeof(df11::published::BlockState);"
    return compile_ptx(
        tmp_path_factory.mktemp("published"), f"{count_sass.PUBLISHED_SOURCE}\n{size}\n"
    )


def decode_native(ptx, arrays, indices, *, blocks=2, moved=None, seed=0, bands=False):
    """The weights of slices, or bands, `indices[i]` of each of the arrays, by one launch.

    `moved` has by how many bytes some of the buffers are not aligned.
    """
    memory, batch = GlobalMemory(), DecodeBatch()
    for array, index in zip(arrays, indices, strict=True):
        view = fill_tensor(memory, batch.tensors[batch.count], array, index, moved or {}, bands)
        batch.count += 1
        chunks = len(index) * view.chunks
        batch.first_chunk[batch.count] = batch.first_chunk[batch.count - 1] + chunks
    kernel = read_kernel(ptx, "decode_kernel")
    launch(kernel, memory, bytes(batch), blocks=blocks, threads=THREADS, seed=seed)
    return [memory.read_back(tensor.out).view(np.uint16) for tensor in batch.tensors[: batch.count]]


def decode_groups(ptx, chunks, arrays, indices, *, blocks=2, seed=0):
    """As `decode_native`, by the kernel for groups of so many chunks."""
    memory, batch = GlobalMemory(), BulkBatch()
    for array, index in zip(arrays, indices, strict=True):
        i = batch.count
        tensor = batch.tensors[i]
        view = fill_tensor(memory, tensor, array, index, {})
        rows = len(index) * view.batch * view.k
        batch.maps[i] = TensorMap(tensor.out, view.n // 64, rows, 2 * view.n, chunks)
        groups = view.batch * (view.k // (16 * view.steps)) * (view.n // (64 * chunks))
        singles = len(index) * (view.chunks - chunks * groups)
        batch.first_single[i + 1] = batch.first_single[i] + singles
        # A block each, and the first what is left.
        own = 1 if i else blocks + 1 - len(arrays)
        end = batch.first_block[i] + min(own, len(index) * groups)
        batch.first_block[i + 1 :] = [end] * (11 - i)
        batch.count += 1
    kernel = read_kernel(ptx, "bulk_decode_kernel")
    (dynamic,) = re.findall(r"kBulkBytes = (\d+);", ptx)
    launch(
        kernel,
        memory,
        bytes(batch),
        blocks=blocks,
        threads=GROUPS_THREADS,
        dynamic_shared=int(dynamic),
        seed=seed,
    )
    return [memory.read_back(tensor.out).view(np.uint16) for tensor in batch.tensors[: batch.count]]


def decode_by_xla(array, index):
    """As `decode_native`, of one array."""
    stack_axes = len(array.stack_shape)
    payload = [part[None] if stack_axes else part[None, None] for part in array.payload]
    return to_bits(_xla_decoder.decode(jnp.array(index), *payload, layout=array.layout))


def decode_published(ptx, unit, *, blocks=2):
    memory, param = GlobalMemory(), Unit()
    for name in Unit.ARRAYS:
        setattr(param, name, memory.allocate(np.asarray(getattr(unit, name))))
    param.out = memory.allocate(np.full(unit.size, UNWRITTEN, np.uint16), writable=True)
    param.size, param.encoded_bytes = unit.size, unit.encoded_exponent.size
    param.blocks = -(-param.encoded_bytes // 4096)
    param.positions, param.rows = unit.output_positions.size, len(unit.luts) - 1
    (dynamic,) = re.findall(r"kBlockStateBytes = (\d+);", ptx)
    launch(
        read_kernel(ptx, "decode_kernel"),
        memory,
        bytes(param),
        blocks=blocks,
        threads=THREADS,
        dynamic_shared=int(dynamic),
    )
    return memory.read_back(param.out).view(np.uint16)


SHAPES = [(1,), (63,), (8191,), (8193,), (130, 72), (100, 100), (256, 192)]
MOVED = [*itertools.product([(8191,), (100, 100), (256, 192)], [{"out": 2}, {"exponents": 4}])]


@pytest.mark.parametrize(("shape", "moved"), [*((shape, {}) for shape in SHAPES), *MOVED], ids=str)
def test_native(native_ptx, shape, moved):
    weights = sprinkled(shape, math.prod(shape) // 100)
    small = df11_jax.compress(weights)
    # What nobody has written to shared memory and registers must not matter.
    for seed in range(2):
        (out,) = decode_native(native_ptx, [small], [[0]], moved=moved, seed=seed)
        np.testing.assert_array_equal(out, to_bits(weights))


def test_native_every_pattern(native_ptx):
    weights = every_pattern()
    (out,) = decode_native(native_ptx, [df11_jax.compress(weights)], [[0]])
    np.testing.assert_array_equal(out, to_bits(weights))


@pytest.mark.parametrize("shape", [(130, 72), (256, 192), (40, 144)])
def test_native_along_columns(native_ptx, shape):
    weights = sprinkled(shape, 50)
    small = df11_jax.compress(weights, along_columns=True)
    (out,) = decode_native(native_ptx, [small], [[0]])
    np.testing.assert_array_equal(out, to_bits(weights))


def test_native_bands(native_ptx):
    stack = sprinkled((2, 250, 144), 200)  # the last band of a slice lacks 6 rows
    small = df11_jax.compress(stack, stack_axes=1, along_columns=True)
    (out,) = decode_native(native_ptx, [small], [[4, -1, 3, 0, 99]], bands=True)
    bands = out.reshape(5, 64, 144)
    np.testing.assert_array_equal(bands[0], to_bits(stack[1, :64]).reshape(64, 144))
    np.testing.assert_array_equal(bands[3], to_bits(stack[0, :64]).reshape(64, 144))
    for band, rows in ((bands[2], stack[0, 192:]), (bands[4], stack[1, 192:])):
        np.testing.assert_array_equal(band[:58], to_bits(rows).reshape(58, 144))
        assert (band[58:] == UNWRITTEN).all()
    assert (bands[1] == UNWRITTEN).all()


@pytest.mark.parametrize("shape", [(128, 128), (1024, 128), (300, 448), (2, 128, 256)])
def test_groups(groups, shape):
    weights = sprinkled(shape, 100)
    small = df11_jax.compress(weights)
    for seed in range(2):
        (out,) = decode_groups(*groups, [small], [[0]], seed=seed)
        np.testing.assert_array_equal(out, to_bits(weights))


def test_groups_of_many(groups):
    stack = sprinkled((3, 256, 256), 300)
    raw, other = every_pattern(), sprinkled((380, 192), 60)
    small = [df11_jax.compress(stack, stack_axes=1), *map(df11_jax.compress, (raw, other))]
    outs = decode_groups(*groups, small, [[2, -1, 0, 9], [0], [0]], blocks=3)
    expected = to_bits(stack[[2, 0, 0, 2]])
    expected[256 * 256 : 2 * 256 * 256] = UNWRITTEN
    np.testing.assert_array_equal(outs[0], expected)
    np.testing.assert_array_equal(outs[1], to_bits(raw))
    np.testing.assert_array_equal(outs[2], to_bits(other))


def test_native_launch_of_many(native_ptx):
    stack = sprinkled((3, 144, 128), 100)
    weights = [stack, *(sprinkled((16 * i + 1, 64), 5) for i in range(16))]
    small = [df11_jax.compress(w, stack_axes=int(w is stack)) for w in weights]
    indices = [[2, 0, -4, 9], *([0] for _ in weights[1:])]
    outs = decode_native(native_ptx, small, indices, blocks=3)
    np.testing.assert_array_equal(outs[0], to_bits(stack[[2, 0, 0, 2]]))
    for out, expected in zip(outs[1:], weights[1:], strict=True):
        np.testing.assert_array_equal(out, to_bits(expected))


def test_corrupt_native(native_ptx):
    """It is poisoned as the decoder in plain XLA poisons it, and nothing else is touched."""
    good = compressed(sprinkled((80, 128), 80), steps=2)
    poisoned = 0
    for i in range(20):
        bad = damaged(good, i)
        (out,) = decode_native(native_ptx, [bad], [[0]])
        np.testing.assert_array_equal(out, decode_by_xla(bad, [0]))
        poisoned += np.any(out == 0xFFFF)
    assert poisoned > 15


def test_corrupt_groups(groups):
    """The same; at last, codes are longer than the header allows."""
    good = compressed(sprinkled((96, 128), 50), steps=2)
    poisoned = 0
    for i in range(11):
        if i == 10:
            layout = dataclasses.replace(good.layout, code_bits=11)
            header, known = np.array(good.header), _layout.CODEBOOK_ID
            header[:known] = _layout.pack_header(layout)[:known]
            bad = dataclasses.replace(good, header=jnp.asarray(header), layout=layout)
        else:
            bad = damaged(good, i)
        (out,) = decode_groups(*groups, [bad], [[0]], blocks=1)
        np.testing.assert_array_equal(out, decode_by_xla(bad, [0]))
        poisoned += np.any(out == 0xFFFF)
    assert poisoned > 7 and (out == 0xFFFF).all()


@pytest.mark.parametrize("count", [1, 7, 4097, 40_001])
def test_published(published_ptx, count):
    weights = random_weights((count,))
    unit = published.encode_unit({"w": np.asarray(weights)})
    np.testing.assert_array_equal(decode_published(published_ptx, unit), to_bits(weights))


def test_published_long_codes(published_ptx):
    weights = np.array(random_weights((50_000,)))
    bits = weights.view(np.uint16)
    bits[::700] = RNG.integers(0, 240 << 7, bits[::700].size)
    unit = published.encode_unit({"w": weights})
    np.testing.assert_array_equal(decode_published(published_ptx, unit, blocks=3), bits)


def test_corrupt_published(published_ptx):
    good = published.encode_unit({"w": np.asarray(random_weights((8_000,)))})
    for i in range(20):
        name = Unit.ARRAYS[i % 5]
        words = np.array(getattr(good, name))
        flat = words.reshape(-1).view(np.uint8)
        flat[RNG.integers(flat.size)] ^= 1 << RNG.integers(8)
        # Any bits will do, since the layout has no checksum; but no faults and no races.
        out = decode_published(published_ptx, dataclasses.replace(good, **{name: words}))
        if name == "sign_mantissa":
            assert np.all(out & 0x7F80 == to_bits(random_weights((8_000,))) & 0x7F80)


def test_every_native_barrier_is_needed(native_ptx):
    """Or else the simulated device would not find races either."""
    weights = [sprinkled((1536, 128), 400), every_pattern(), sprinkled((130, 72), 5)]
    small = [df11_jax.compress(w) for w in weights]

    def is_noticed(changed):
        try:
            outs = decode_native(changed, small, [[0], [0, 0], [0]])
        except KernelError:
            return True
        return any(
            not np.array_equal(out[: w.size], to_bits(w))
            for out, w in zip(outs, weights, strict=True)
        )

    orders = r"bar\.(warp\.)?sync|cp\.async\.wait_group"
    assert not unnoticed(native_ptx, "decode_kernel", orders, is_noticed)


# Those of pairs are, as they stand in the source, in emulation/test_left_out.py.
@pytest.mark.parametrize("groups", [1], indirect=True)
def test_every_barrier_of_groups_is_needed(groups):
    """The same; in each of few chunks is something that needs one."""
    rng = np.random.default_rng(1)

    def patch(weights, count):
        bits = weights.view(np.uint16).reshape(-1)
        bits[rng.choice(bits.size, count, replace=False)] = rng.integers(0, 2**16, count)

    rows = 80  # of groups of a slice, a warp has more than one
    stack = np.array(random_weights((2, rows, 192)))
    stack[1] *= 64  # needs another table
    patch(stack, 80)
    stack[0, 64:80, :64], stack[0, 70, 100] = 0.02, 1e30  # of a pair, only the second has patches
    stack[0, :32, 64:128] = every_pattern()[:32, :64]  # raw
    small = compressed(stack, steps=2, stack_axes=1)
    words = np.array(small.sign_mantissa)
    words[1, [5, 4 * 512 + 9]] ^= 1  # chunks that are to be poisoned, one of either side of a pair
    small = dataclasses.replace(small, sign_mantissa=jnp.asarray(words))
    long = np.array(random_weights((128, 64)))
    patch(long, 950)
    cases = [(small, [0, 1]), (df11_jax.compress(long), [0])]
    assert cases[1][0].chunk_offsets[1] > 1472  # there is no room for the record
    expected = [decode_by_xla(array, index) for array, index in cases]
    assert (expected[0] != to_bits(stack)).sum() == 2 * 32 * 64

    def is_noticed(changed):
        for (array, index), right in zip(cases, expected, strict=True):
            try:
                (out,) = decode_groups(changed, groups[1], [array], [index], blocks=1)
            except KernelError:
                return True
            if not np.array_equal(out, right):
                return True
        return False

    assert not is_noticed(groups[0])
    orders = r"bar\.(warp\.)?sync|mbarrier\.try_wait|cp\.async\.(bulk\.)?wait_group|fence\.proxy"
    found = unnoticed(groups[0], "bulk_decode_kernel", orders, is_noticed)
    # Two, of which either lets all lanes see the warp's new barriers: the one behind GroupDecoder,
    # and that of keep_order, which is for the compiler's sake. Also that with which decode_chunk
    # begins: between two of them are those of skip_steps.
    assert len(found) == 3, found


def test_misaligned_and_out_of_bounds(native_ptx):
    small = df11_jax.compress(random_weights((128, 64)))
    # The launcher refuses this; the kernel relies on it.
    with pytest.raises(KernelError, match="not aligned"):
        decode_native(native_ptx, [small], [[0]], moved={"sign_mantissa": 4})
    cut = dataclasses.replace(small, sign_mantissa=small.sign_mantissa[:-4])
    with pytest.raises(KernelError, match="out of bounds"):
        decode_native(native_ptx, [cut], [[0]])
