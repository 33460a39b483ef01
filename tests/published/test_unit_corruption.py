"""Corrupt published units: a clear error or poison, from every decoder, and nothing else."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import published_cases
import pytest
from payloads import bits

from df11_jax import _cpu_library
from df11_jax.published import _unit, decompress, encode_unit, xla_decoder
from df11_jax.published._unit import decode_host

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU handler's errors")
STREAM_FIELDS = ("encoded_exponent", "output_positions", "gaps")


@pytest.fixture(scope="module")
def weights():
    return published_cases.normal(40000).view(jnp.bfloat16)


@pytest.fixture(scope="module")
def unit(weights):
    return encode_unit({"w": weights})


def replace(unit, **changes):
    """The unit with an entry of some fields changed, `field=(index, value)`, or whole fields."""
    for name, change in changes.items():
        if isinstance(change, tuple):
            index, value = change
            change = np.array(getattr(unit, name))
            change[index] = value
        unit = dataclasses.replace(unit, **{name: change})
    return unit


def damage(unit, rng, fields):
    """Flips a bit or overwrites an entry or two."""
    changed = {}
    for _ in range(rng.integers(1, 3)):
        field = rng.choice(fields)
        array = changed.setdefault(field, np.array(getattr(unit, field))).reshape(-1)
        at = rng.integers(len(array))
        number_of_bits = 8 * array.itemsize
        if rng.integers(2):
            array[at] ^= array.dtype.type(1 << int(rng.integers(number_of_bits)))
        else:
            array[at] = rng.integers(2**number_of_bits, dtype=np.uint64)
    return dataclasses.replace(unit, **changed)


def set_gap(gaps, window, value):
    """Gaps with another one for a window."""
    unpacked = np.unpackbits(gaps).reshape(-1, 5)
    unpacked[window] = np.unpackbits(np.uint8(value))[3:]
    return np.packbits(unpacked)


@on_cpu
def test_cpu_handler_agrees_with_the_host(unit):
    rng = np.random.default_rng(0)
    decode = jax.jit(lambda u: decompress(u)["w"])
    refused = 0
    for _ in range(300):
        bad = damage(unit, rng, ("luts", *STREAM_FIELDS))
        try:
            expected = decode_host(bad)
        except ValueError as error:
            refused += 1
            problem = re.sub("^w: is corrupt: ", "", str(error))
            with pytest.raises(jax.errors.JaxRuntimeError, match="DATA_LOSS") as raised:
                jax.block_until_ready(decode(bad))
            assert "df11_published_decode: 'w' is corrupt: " in str(raised.value)
            # With two threads, the host may find another of two problems.
            assert problem in str(raised.value) or "block" in str(raised.value)
        else:
            np.testing.assert_array_equal(bits(decode(bad)), bits(expected))
    assert refused > 200


def test_xla_decoder_agrees_with_the_host(unit):
    rng = np.random.default_rng(0)
    poisoned = 0
    for _ in range(200):
        bad = damage(unit, rng, STREAM_FIELDS)
        out = bits(xla_decoder.decode(*bad.arrays))
        # Among other positions, the host may not find a block that is good.
        same_positions = np.array_equal(bad.output_positions, unit.output_positions)
        for start, stop in itertools.pairwise(unit.output_positions):
            found = out[start:stop]
            poison = (found == 0xFFFF).all()
            poisoned += poison
            try:
                expected = bits(decode_host(bad, int(start), int(stop), threads=1))
            except ValueError:
                assert poison or not same_positions
            else:
                assert poison or np.array_equal(found, expected)
    assert poisoned > 150


def test_xla_decoder_takes_no_end_symbol_for_an_element():
    """Where damage makes fewer codes of a stream, the symbol that fills it up comes too soon."""
    unit = encode_unit({"w": published_cases.normal(500).view(jnp.bfloat16)})
    streams = np.repeat(unit.encoded_exponent[None], 128, axis=0)
    for bit, stream in enumerate(streams):
        stream[bit // 8] ^= 1 << bit % 8
    decode = jax.vmap(xla_decoder.decode, in_axes=(None, 0, None, None, None))
    arrays = unit.sign_mantissa, streams, unit.luts, unit.output_positions, unit.gaps
    refused = 0
    for stream, found in zip(streams, bits(decode(*arrays)), strict=True):
        try:
            expected = bits(decode_host(dataclasses.replace(unit, encoded_exponent=stream)))
        except ValueError:
            refused += 1
            expected = np.full_like(found, 0xFFFF)
        np.testing.assert_array_equal(found, expected)
    assert 30 < refused < 128


def test_xla_decoder_survives_any_tables(unit):
    rng = np.random.default_rng(0)
    good = bits(xla_decoder.decode(*unit.arrays))
    for luts in (
        np.full_like(unit.luts, 255),
        np.full_like(unit.luts, 240),
        np.zeros_like(unit.luts),
        rng.integers(256, size=unit.luts.shape, dtype=np.uint8),
        replace(unit, luts=(-1, 255)).luts,
    ):
        out = bits(xla_decoder.decode(*dataclasses.replace(unit, luts=luts).arrays))
        assert (out == 0xFFFF).all()
    for _ in range(50):
        out = bits(xla_decoder.decode(*damage(unit, rng, ["luts"]).arrays))
        # What does not need the entry is right.
        assert ((out == good) | (out == 0xFFFF)).mean() > 0.2


@pytest.mark.parametrize("kind", [255, 240, 254, "self"])
def test_tables_with_cycles(unit, kind):
    luts = np.array(unit.luts)
    luts[:-1] = 255 if kind == "self" else kind
    if kind == "self":  # every row but the first points to itself
        for row in range(1, len(luts) - 1):
            luts[row] = 256 - row
    bad = dataclasses.replace(unit, luts=luts)
    with pytest.raises(ValueError, match="w: is corrupt: luts has "):
        decode_host(bad)
    assert _cpu_library.published_check(*bad.arrays).startswith("luts ")
    assert (bits(xla_decoder.decode(*bad.arrays)) == 0xFFFF).all()


FREQUENT = 121  # an exponent of `weights` with a short code


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"luts": ((-1, FREQUENT), 0)}, "luts has in row 0, entry [0-9]+, exponent 121, which"),
        ({"luts": ((-1, FREQUENT), 33)}, "luts gives exponent 121 a code of 33 bits, expected at"),
        ({"luts": ((-1, FREQUENT), 20)}, "luts has in row 0, entry [0-9]+, exponent 121, which"),
        ({"luts": ((-1, 3), 5)}, "luts gives exponent 3 a code of 5 bits, but has no such code"),
        ({"luts": ((-1, 240), 5)}, "luts gives exponent 240 a code of 5 bits, expected none"),
        ({"luts": ((0, slice(None)), 3)}, "luts has in row 0, entry 1, exponent 3|luts has row 1"),
        ({"output_positions": (0, 1)}, "output_positions begins with 1, expected 0"),
        ({"output_positions": (-1, 39999)}, "output_positions ends with 39999, expected 40000"),
        ({"output_positions": (1, 50000)}, "output_positions has block 0 hold elements 0 to 50000"),
        ({"output_positions": (2, 5)}, "output_positions has block 1 hold elements [0-9]+ to 5 of"),
        ({"gaps": (0, 0x80)}, "gaps has the first code not start at bit 0"),
        ({"gaps": (-1, 0xFF)}, "gaps has a code start after the end .* window 510 of the last"),
    ],
)
def test_structure_is_checked(unit, change, problem):
    bad = replace(unit, **change)
    assert re.match(problem, _cpu_library.published_check(*bad.arrays))
    if "after the end" in problem:  # where nothing is read
        np.testing.assert_array_equal(bits(decode_host(bad)), bits(decode_host(unit)))
    else:
        with pytest.raises(ValueError, match=r"^w: is corrupt: (luts|output_positions|gaps) "):
            decode_host(bad)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        # A position that is off by one, and those that move elements from a block to the next.
        (lambda u: {"output_positions": (1, u.output_positions[1] + 1)}, "block 0 .* holds fewer"),
        (lambda u: {"output_positions": (1, u.output_positions[1] - 1)}, "block 0 .* holds more"),
        (
            lambda u: {"gaps": set_gap(u.gaps, 100, 31)},
            "block 0 .* has no code that starts in window 100 where gaps says",
        ),
        (
            lambda u: {"gaps": set_gap(u.gaps, 512, 31)},
            "block 0 .* does not end where gaps says that block 1 begins",
        ),
        (
            lambda u: {"encoded_exponent": (slice(5000, 5100), 0)},
            "block 1 of encoded_exponent has no code that starts in window 1[0-9][0-9] where gaps",
        ),
        (
            lambda u: {"encoded_exponent": u.encoded_exponent[:-1]},
            "encoded_exponent has [0-9]+ bytes, but its last code ends in byte|holds fewer",
        ),
        (
            lambda u: {"encoded_exponent": np.append(u.encoded_exponent, np.uint8(0))},
            "encoded_exponent has [0-9]+ bytes, but its last code ends in byte",
        ),
    ],
)
def test_decoding_finds_what_the_structure_does_not_show(unit, change, problem):
    bad = replace(unit, **change(unit))
    assert _cpu_library.published_check(*bad.arrays) == ""
    with pytest.raises(ValueError, match=f"w: is corrupt: .*{problem}"):
        decode_host(bad, threads=1)


def test_fewer_elements_than_codes(weights):
    """Sign and mantissa of another size than the stream, with positions to match."""
    unit = encode_unit({"w": weights})
    fewer = len(weights) - 5
    bad = replace(unit, sign_mantissa=unit.sign_mantissa[:fewer], output_positions=(-1, fewer))
    bad = dataclasses.replace(bad, shapes=((fewer,),))
    with pytest.raises(ValueError, match="bytes, but its last code ends in byte"):
        decode_host(bad)


ARRAYS_OF_OTHER_SIZES = [
    (
        "sign_mantissa",
        lambda a: a[:-1],
        r"sign_mantissa is uint8\[39999\], expected uint8\[40000\]",
    ),
    ("encoded_exponent", lambda a: a[:0], r"encoded_exponent is uint8\[0\], expected uint8\[1\]"),
    ("encoded_exponent", lambda a: a[:5000], r"output_positions is uint32\[5\], expected uint32"),
    ("luts", lambda a: a[:1], r"luts is uint8\[1, 256\], expected uint8\[2, 256\]"),
    ("luts", lambda a: a[:, 1:], r"luts is uint8\[[0-9]+, 255\], expected"),
    ("luts", lambda a: np.tile(a, (9, 1)), r"luts is uint8\[[0-9]+, 256\], expected uint8\[18, "),
    ("luts", lambda a: a.astype(np.int32), "luts is int32"),
    ("output_positions", lambda a: a[:-2], "output_positions is uint32"),
    ("output_positions", lambda a: a.view(np.uint8), "output_positions is uint8"),
    ("gaps", lambda a: a[:-1], r"gaps is uint8\[1279\], expected uint8\[1280\]"),
]


@pytest.mark.parametrize(("field", "change", "problem"), ARRAYS_OF_OTHER_SIZES)
def test_arrays_that_disagree(unit, field, change, problem):
    bad = dataclasses.replace(unit, **{field: change(getattr(unit, field))})
    for function in (decompress, decode_host, jax.jit(decompress)):
        with pytest.raises(ValueError, match=f"^w: {problem}"):
            function(bad)
    if field != "sign_mantissa" and "int" not in problem.split(" is ")[1][:3]:
        assert _cpu_library.published_check(*bad.arrays) != ""


@on_cpu
def test_handler_checks_what_it_is_given(unit):
    """A program that was not made by `decompress` can call it with anything."""

    def call(*arrays, dtype=jnp.bfloat16, size=40000):
        out = jax.ShapeDtypeStruct((size,), dtype)
        target = _unit._ffi.PUBLISHED_DECODE_TARGET
        return jax.ffi.ffi_call(target, out)(*arrays, name="unit")

    np.testing.assert_array_equal(bits(call(*unit.arrays)), bits(decompress(unit)["w"]))
    wrong = [
        ({"sign_mantissa": unit.sign_mantissa[:5]}, {}, "the result has 40000 entries, expected 5"),
        ({"luts": unit.luts.view(np.int8)}, {}, "luts must be uint8 with 2 axes"),
        ({"luts": unit.luts[:1]}, {}, r"luts has shape \[1,256\], expected \[2 to 18,256\]"),
        ({"gaps": unit.gaps[:-5]}, {}, "gaps has 1275 entries, expected 1280"),
        ({"output_positions": unit.output_positions[:2]}, {}, "output_positions has 2 entries"),
        ({"encoded_exponent": unit.encoded_exponent[:0]}, {}, "encoded_exponent has 0 entries"),
        ({}, {"dtype": jnp.float16}, "the result must be bfloat16 with 1 axes"),
        ({}, {"size": 39999}, "the result has 39999 entries, expected 40000"),
    ]
    for arrays, options, problem in wrong:
        bad = dataclasses.replace(unit, **arrays)
        with pytest.raises(
            jax.errors.JaxRuntimeError,
            match=f"INVALID_ARGUMENT.*df11_published_decode: 'unit': {problem}",
        ):
            jax.block_until_ready(call(*bad.arrays, **options))
