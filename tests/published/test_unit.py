"""One published unit: encoded as the reference does, decoded bit for bit by every decoder."""

import dataclasses
import json
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import published_cases
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from mostly_slow import mostly_slow
from payloads import assert_same_bits, bits, random_weights

import df11_jax
from df11_jax import _cpu_library, _ffi
from df11_jax.published import _unit, decompress, encode_unit, xla_decoder
from df11_jax.published._unit import decode_host

FIXTURES = json.loads((pathlib.Path(__file__).parent / "fixtures" / "encoder.json").read_text())
CASES = published_cases.cases()
LARGE = "code of over 32 bits"
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU handler")


def as_tensors(parts):
    return {f"tensor {i}": part.view(jnp.bfloat16) for i, part in enumerate(parts)}


def as_published(unit):
    """The fields as a file has them."""
    ends = np.cumsum([int(np.prod(shape)) for shape in unit.shapes])
    return {name: np.asarray(getattr(unit, name)) for name in _unit.ARRAYS} | {
        "split_positions": ends[:-1].astype(np.int64)
    }


def host_weights(shape, seed=0):
    return np.array(random_weights(shape, seed))


@pytest.fixture(scope="module")
def tensors():
    return {
        "q": host_weights((64, 100)),
        "nothing": host_weights((0, 7)),
        "k": host_weights((3, 5, 1000), 1),
        "scale": host_weights((), 2),
    }


@pytest.fixture(scope="module")
def unit(tensors):
    return encode_unit(tensors)


def assert_same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor)


def test_eager_decoding_goes_by_where_the_arrays_are(tensors, unit, monkeypatch, caplog):
    # As in test_transforms.py. No other test has this list of platforms, so nothing is compiled.
    monkeypatch.setattr("df11_jax._ffi.platforms", lambda target: ("cpu", "a third"))
    with jax.log_compiles():
        assert_same_tensors(decompress(unit), tensors)
    programs = [message for message in caplog.messages if message.startswith("Compiling")]
    assert not any("platform_index" in program for program in programs)
    assert any("_decode_on_any_platform" in program for program in programs)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_encodes_as_the_reference(name, threads):
    unit = encode_unit(as_tensors(CASES[name]), threads=threads)
    for field, array in as_published(unit).items():
        expected = FIXTURES["units"][name][field]
        if expected is None:
            assert field == "luts"  # which the reference fails to make
            continue
        assert published_cases.digest(array) == expected, field


@pytest.mark.parametrize("place", published_cases.ENDS)
def test_ends_are_where_the_cases_say(place):
    (weights,) = CASES[f"ends {place}"]
    unit = encode_unit({"w": weights.view(jnp.bfloat16)})
    lengths = unit.luts[-1].astype(np.int64)[weights >> 7 & 0xFF]
    end = lengths.sum()
    begin = end - lengths[-1]
    blocks = -(-len(unit.encoded_exponent) // 4096)
    in_two_blocks = begin // 32768 != (end - 1) // 32768
    assert (end % 32768 == 0) == (place == "with a block")
    assert (end % 64 == 0) == (place in ("with a block", "with a window"))
    assert (end % 8 == 0) == place.startswith("with")
    assert in_two_blocks == place.endswith("two blocks")
    assert len(unit.output_positions) == blocks + (
        place != "with a byte, the last code in two blocks"
    )


@pytest.mark.parametrize("name", mostly_slow(CASES, fast=7))
def test_every_decoder(name):
    expected = np.concatenate(CASES[name]).view(jnp.bfloat16)
    unit = encode_unit(as_tensors(CASES[name]))
    assert _cpu_library.published_check(*unit.arrays) == ""
    assert_same_bits(decode_host(unit), expected)
    assert_same_tensors(decompress(unit), as_tensors(CASES[name]))
    if name != LARGE:  # which would take half a minute
        assert_same_bits(xla_decoder.decode(*unit.arrays), expected)


@on_cpu
@pytest.mark.parametrize("level", _cpu_library.simd_levels())
def test_every_instruction_set(level, tensors, unit):
    _cpu_library.use_simd(level)
    try:
        assert_same_tensors(decompress(unit), tensors)
    finally:
        _cpu_library.use_simd(_cpu_library.simd_levels()[-1])


@pytest.mark.parametrize("size", [1, 9, 64, 65, 12288])
def test_sizes(size):
    weights = {"w": published_cases.normal(size, str(size)).view(jnp.bfloat16)}
    unit = encode_unit(weights)
    assert_same_bits(xla_decoder.decode(*unit.arrays), weights["w"])
    assert_same_tensors(decompress(unit), weights)


def test_more_sizes():
    """A stream may end anywhere in a window."""
    for size in range(1, 400):
        weights = published_cases.normal(size, str(size)).view(jnp.bfloat16)
        assert_same_bits(decode_host(encode_unit({"w": weights})), weights)


def test_any_part_of_a_unit():
    (weights,) = CASES["normal 40000"]
    unit = encode_unit({"w": weights.view(jnp.bfloat16)})
    positions = [*unit.output_positions.tolist(), 20000]
    ranges = {
        (a + i, b + j) for a in positions for b in positions for i in (-1, 0, 1) for j in (0, 1)
    }
    for start, stop in sorted(ranges):
        if 0 <= start <= stop <= 40000:
            part = decode_host(unit, start, stop, threads=1 + start % 2)
            assert_same_bits(part, weights[start:stop].view(jnp.bfloat16))
    for start, stop in [(-1, 5), (6, 5), (0, 40001)]:
        with pytest.raises(IndexError, match=f"elements {start} to {stop} of a unit of 40000"):
            decode_host(unit, start, stop)


def test_parts_need_only_their_blocks():
    (weights,) = CASES["normal 40000"]
    unit = encode_unit({"w": weights.view(jnp.bfloat16)})
    stream = np.array(unit.encoded_exponent)
    stream[4096 + 2000] ^= 0xFF
    damaged = dataclasses.replace(unit, encoded_exponent=stream)
    _, second, third, *_ = unit.output_positions.tolist()
    for start, stop in [(0, second), (third, 40000)]:
        assert_same_bits(decode_host(damaged, start, stop), weights[start:stop].view(jnp.bfloat16))
    with pytest.raises(ValueError, match="w: is corrupt: block 1 of encoded_exponent"):
        decode_host(damaged, second - 1, second + 1)


def test_reads_memory_that_is_read_only_or_unaligned(unit, tensors):
    def unaligned(array):
        room = np.zeros(array.nbytes + 1, np.uint8)
        room[1:] = array.reshape(-1).view(np.uint8)
        view = room[1:].view(array.dtype).reshape(array.shape)
        view.flags.writeable = False
        return view

    expected = np.concatenate([tensor.reshape(-1) for tensor in tensors.values()])
    assert_same_bits(decode_host(jax.tree.map(unaligned, unit)), expected)


def test_attributes(unit, tensors):
    assert unit.names == tuple(tensors)
    assert unit.shapes == ((64, 100), (0, 7), (3, 5, 1000), ())
    assert unit.size == 21401
    assert unit.nbytes == 2 * 21401
    assert unit.compressed_nbytes == sum(array.nbytes for array in unit.arrays)
    bits_each = 8 * unit.compressed_nbytes / 21401
    assert repr(unit) == f"PublishedUnit(q and 3 more, 21401 weights, {bits_each:.2f} bits/weight)"
    assert "sign_mantissa=NoneType" in repr(jax.tree.map(lambda _: None, unit))


def test_is_a_pytree(unit, tensors):
    leaves, treedef = jax.tree.flatten(unit)
    assert len(leaves) == 5
    again = jax.tree.unflatten(treedef, map(jnp.asarray, leaves))
    assert (again.names, again.shapes) == (unit.names, unit.shapes)
    assert_same_tensors(decompress(pickle.loads(pickle.dumps(again))), tensors)


def test_without_a_compiled_decoder(unit, tensors, monkeypatch):
    monkeypatch.setattr(_ffi, "platforms", lambda target: ())
    assert_same_tensors(decompress(unit), tensors)


@pytest.mark.parametrize("compiled_decoder", [True, False])
def test_strict_modes(unit, tensors, compiled_decoder, monkeypatch):
    if not compiled_decoder:
        monkeypatch.setattr(_ffi, "platforms", lambda target: ())
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert_same_tensors(decompress(unit), tensors)


def test_jit(unit, tensors):
    compiled = jax.jit(decompress).lower(unit).compile()
    assert _ffi.PUBLISHED_DECODE_TARGET in compiled.as_text()
    assert_same_tensors({name: compiled(unit)[name] for name in tensors}, tensors)


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_and_scan(jit):
    # The same weights in another order have another stream, but one of the same length.
    weights = [np.roll(host_weights((40, 32)), 100 * i) for i in range(3)]
    units = [encode_unit({"w": w}) for w in weights]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *units)
    for function in (
        jax.vmap(decompress),
        lambda stack: jax.lax.scan(lambda c, unit: (c, decompress(unit)), None, stack)[1],
    ):
        out = (jax.jit(function) if jit else function)(stack)["w"]
        assert_same_bits(out, np.stack(weights))


@pytest.mark.parametrize("compiled_decoder", [True, False])
def test_shard_map(compiled_decoder, monkeypatch):
    if not compiled_decoder:
        monkeypatch.setattr(_ffi, "platforms", lambda target: ())
    weights = host_weights((40, 32))
    weights = np.stack([weights, np.roll(weights, 100)])
    units = [encode_unit({"w": w}) for w in weights]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *units)
    function = jax.shard_map(
        jax.vmap(decompress),
        mesh=Mesh(np.array(jax.devices()[:2]), ("layers",)),
        in_specs=P("layers"),
        out_specs=P("layers"),
    )
    assert_same_bits(jax.jit(function)(stack)["w"], weights)


def test_grad_and_checkpoint(unit, tensors):
    x = random_weights((3, 64), seed=1, scale=1.0)

    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))

    expected = jax.grad(loss)(x, tensors["q"])
    for function in (
        lambda x, unit: loss(x, decompress(unit)["q"]),
        jax.checkpoint(lambda x, unit: loss(x, decompress(unit)["q"])),
    ):
        assert_same_bits(jax.grad(function)(x, unit), expected)
    weights, tangents = jax.jvp(decompress, (unit,), (jax.tree.map(float0_like, unit),))
    assert_same_tensors({name: weights[name] for name in tensors}, tensors)
    assert not any(jnp.any(tangent) for tangent in tangents.values())


def float0_like(array):
    return np.zeros(array.shape, jax.dtypes.float0)


def test_export(unit, tensors):
    exported = export.export(jax.jit(decompress), disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS)(
        jax.tree.map(jnp.asarray, unit)
    )
    again = export.deserialize(exported.serialize())
    out = again.call(unit)
    assert_same_tensors({name: out[name] for name in tensors}, tensors)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 2.0**113])
def test_refuses_exponents_that_have_no_code(value):
    weights = {"a": host_weights((4, 6)), "b": host_weights((4, 6))}
    weights["b"][2, 3] = value
    with pytest.raises(ValueError, match=r"^b: element \(2, 3\) is .*below 2\^113"):
        encode_unit(weights)
    with pytest.raises(ValueError, match=repr(float(value)).replace("+", r"\+")):
        encode_unit(weights)


def test_largest_exponent_that_has_a_code():
    weights = np.array([2.0**112, -(2.0**112), 2.0**-133, 0.0, -0.0], jnp.bfloat16)
    unit = encode_unit({"w": weights})
    assert bits(weights)[0] >> 7 == 239
    assert_same_bits(decompress(unit)["w"], weights)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_refuses_other_types(dtype):
    with pytest.raises(TypeError, match=f"w: .*bfloat16, got {np.dtype(dtype)}"):
        encode_unit({"w": np.zeros(3, dtype)})
    with pytest.raises(TypeError, match=r"w: .*numpy arrays"):
        encode_unit({"w": [1.0]})


@pytest.mark.parametrize("weights", [{}, {"a": np.zeros((3, 0), jnp.bfloat16)}])
def test_refuses_units_without_elements(weights):
    with pytest.raises(ValueError, match="0 elements in all, and a unit has at least 1"):
        encode_unit(weights)


def test_refuses_codes_that_need_too_many_tables():
    exponents = np.repeat(np.arange(200), 1 + (np.arange(200) < 5) * 10**5)
    weights = published_cases.with_exponents(exponents).view(jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"a and 1 more: .* needs [0-9]+ look-up tables, and only 17"
    ):
        encode_unit({"a": weights[:1000], "b": weights[1000:]})


def test_takes_nothing_but_units():
    with pytest.raises(TypeError, match="decompress takes a PublishedUnit, got ndarray"):
        decompress(np.zeros(3))
