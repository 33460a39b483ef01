import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_encoder
from mostly_slow import mostly_slow
from payloads import assert_same_bits, bits, from_payload, random_weights

from df11_jax import _xla_decoder, compress
from df11_jax._decode import decompress

SHAPES = [
    (),
    (3,),
    (64,),
    (1, 1),
    (130, 72),  # flat
    (130, 344),  # flat
    (48, 1376),  # padded
    (15, 64),
    (128, 64),  # one chunk
    (192, 128),  # tile rows of 8 and 4 steps
    (136, 128),
    (1000,),
    (5, 7, 11),
    (2, 3, 64, 64),
    (50, 1000),
    (0,),
    (0, 64),
]
CUTS = {
    "half chunks": {"steps": 4},
    "quarter chunks": {"steps": 2},
    "short codes": {"code_bits": 9},
    "along columns": {"along_columns": True},
    "along columns, quarter chunks": {"along_columns": True, "steps": 2, "code_bits": 10},
    "batches": {"batch_axes": 1},
    "batches along columns": {"batch_axes": 1, "along_columns": True, "steps": 4},
    "one row axis": {"row_axes": 1},
}
OPTIONS = {
    "plain": {},
    "few exponents": {"coded": 3},
    "one exponent": {"coded": 1},
    "patches": {"drop": 0.4},
    "raw": {"raw_chunks": range(1000)},
    "some raw": {"raw_chunks": (0, 3), "drop": 0.2},
}


def decode(a, index=0):
    """Decodes with the XLA decoder, whatever the platform."""
    index = jnp.asarray(index, jnp.int32)
    ones = (1,) * index.ndim
    payload = [
        leaf.reshape(*ones, int(np.prod(a.stack_shape)), leaf.shape[-1]) for leaf in a.payload
    ]
    return _xla_decoder.decode(index, *payload, layout=a.layout)


def all_patterns():
    """All 65,536 bit patterns, most of whose exponents get no code."""
    return jnp.asarray(np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view(jnp.bfloat16))


CASES = [(shape, name) for shape in SHAPES for name in ("plain", "some raw")]
CASES += [((192, 128), name) for name in OPTIONS if name not in ("plain", "some raw")]


@pytest.mark.parametrize(("shape", "options"), mostly_slow(CASES, fast=6), ids=str)
def test_both_decoders_read_the_reference_encoder(shape, options):
    weights = random_weights(shape)
    payload = list(reference_encoder.encode(bits(weights), **OPTIONS[options]))
    # More zeros at the end are allowed; here they save compiling once more for each option.
    payload[3] = np.pad(payload[3], (0, 4 * payload[4].size + 512 - payload[3].size))
    a = from_payload(payload, shape)
    assert_same_bits(decode(a), weights)
    assert_same_bits(decompress(a), weights)


@pytest.mark.parametrize("cut", mostly_slow(CUTS, fast=2))
def test_both_decoders_read_all_ways_to_cut(cut):
    shape = (2, 80, 128)
    weights = random_weights(shape)
    payload = reference_encoder.encode(bits(weights), drop=0.1, raw_chunks=(1,), **CUTS[cut])
    a = from_payload(payload, shape, **CUTS[cut])
    assert_same_bits(decode(a), weights)
    assert_same_bits(decompress(a), weights)
    matrix = {k: v for k, v in CUTS[cut].items() if k not in ("steps", "code_bits")}
    assert_same_bits(decompress(compress(weights, **matrix)), weights)


@pytest.mark.parametrize("shape", [(), (130, 72), (192, 128), (0, 64), (512, 1024)], ids=str)
def test_reads_the_native_encoder(shape):
    weights = random_weights(shape, scale=3.0)
    a = compress(weights)
    assert_same_bits(decode(a), weights)
    assert_same_bits(decompress(a), weights)


@pytest.mark.parametrize("encoder", ["reference", "native"])
def test_all_bit_patterns(encoder):
    weights = all_patterns()
    if encoder == "native":
        a = compress(weights)
    else:
        a = from_payload(reference_encoder.encode(bits(weights)), weights.shape)
    assert_same_bits(decode(a), weights)
    assert_same_bits(decompress(a), weights)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), float("nan")])
def test_constant_weights(value):
    weights = jnp.full((64, 128), value, jnp.bfloat16)
    for payload in (reference_encoder.encode(bits(weights)), compress(weights).payload):
        a = from_payload(payload, weights.shape)
        assert_same_bits(decode(a), weights)
        assert_same_bits(decompress(a), weights)


def test_lanes_of_very_different_length():
    # Lane 0 of each group has only rare exponents, the other lanes only the commonest.
    weights = np.full((128, 64), 0x3F80, np.uint16)
    rows = np.arange(128)
    rare = 0x3E00 + 0x80 * np.random.default_rng(0).integers(0, 16, (32, 64))
    weights[rows // 2 % 8 < 2, :] = rare
    a = from_payload(reference_encoder.encode(weights, drop=0.0), weights.shape)
    base = np.asarray(a.exponents)[1] >> 16
    assert base > 0
    assert_same_bits(decode(a), weights.view(jnp.bfloat16))
    assert_same_bits(decompress(a), weights.view(jnp.bfloat16))


def test_slices_are_clamped_and_batched():
    weights = random_weights((3, 50, 64))
    weights = weights.at[1].multiply(1000)  # another codebook, another length
    payload = reference_encoder.encode_stack(bits(weights), 1, drop=0.1)
    a = from_payload(payload, weights.shape[1:])
    index = jnp.array([[2, 0], [1, 1], [-7, 9]])
    assert_same_bits(decode(a, index), weights[jnp.clip(index, 0, 2)])
    assert_same_bits(jax.vmap(lambda i: decode(a, i))(index), weights[jnp.clip(index, 0, 2)])


def chunks_of(matrix):
    """The chunks of a matrix of whole tiles."""
    rows, cols = matrix.shape
    tiles = matrix.reshape(rows // 128, 128, cols // 64, 64).swapaxes(1, 2)
    return tiles.reshape(-1, 128, 64)


def corruptible():
    weights = random_weights((256, 128))
    payload = reference_encoder.encode(bits(weights), drop=0.2, raw_chunks=(2,))
    return weights, [np.array(array) for array in payload]


@pytest.mark.parametrize("array", range(5), ids=["header", "codebook", "offsets", "exps", "sm"])
def test_flipped_bits_never_go_unnoticed(array):
    weights, payload = corruptible()
    expected = chunks_of(bits(weights))
    rng = np.random.default_rng(array)
    for _ in range(60):
        damaged = [a.copy() for a in payload]
        # The codebook's id, and what is reserved, changes nothing.
        size = 24 if array == 0 else damaged[array].size
        word, bit = rng.integers(size), rng.integers(32)
        damaged[array][word] ^= np.uint32(1 << bit)
        result = chunks_of(bits(decode(from_payload(damaged, weights.shape))))
        same = (result == expected).all(axis=(1, 2))
        poisoned = (result == 0xFFFF).all(axis=(1, 2))
        assert (same | poisoned).all(), (word, bit)
        if array in (0, 4):
            assert poisoned.any(), (word, bit)
        if array in (3, 4):
            assert poisoned.sum() <= 1, (word, bit)


@pytest.mark.parametrize("fill", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("arrays", list(itertools.combinations(range(5), 2)), ids=str)
def test_nonsense_is_poison(arrays, fill):
    weights, payload = corruptible()
    for i in arrays:
        payload[i][...] = fill
    assert (bits(decode(from_payload(payload, weights.shape))) == 0xFFFF).all()


def test_random_words_are_poison():
    weights, payload = corruptible()
    rng = np.random.default_rng(0)
    for i in (1, 2, 3, 4):
        damaged = [a.copy() for a in payload]
        damaged[i] = rng.integers(1 << 32, size=payload[i].size, dtype=np.uint32)
        assert (bits(decode(from_payload(damaged, weights.shape))) == 0xFFFF).all()


def test_header_of_another_shape_is_poison():
    weights, payload = corruptible()
    payload[0] = reference_encoder.encode(np.zeros((128, 256), np.uint16))[0]
    assert (bits(decode(from_payload(payload, weights.shape))) == 0xFFFF).all()


def test_no_exponents_at_all_is_poison():
    weights, payload = corruptible()
    payload[3] = payload[3][:0]
    assert (bits(decode(from_payload(payload, weights.shape))) == 0xFFFF).all()


def test_a_corrupt_slice_leaves_the_others_alone():
    weights = random_weights((3, 128, 64))
    payload = [np.array(a) for a in compress(weights, stack_axes=1).payload]
    payload[0][1, 0] = 1  # another version
    result = np.asarray(decode(from_payload(payload, weights.shape[1:]), jnp.arange(3)))
    assert (bits(result[1]) == 0xFFFF).all()
    assert_same_bits(result[::2], weights[::2])


def test_memory_is_a_small_multiple_of_the_output():
    weights = random_weights((1024, 1024))
    a = compress(weights)
    compiled = jax.jit(decode).lower(a).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * weights.nbytes
