"""Corrupt payloads: the right bits or a clear error, from every decoder, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mostly_slow import mostly_slow
from payloads import assert_same_bits, random_weights

import df11_jax
from df11_jax import _host_codec, _layout, _xla_decoder
from df11_jax._layout import make_layout

RNG = np.random.default_rng(0)


def sample(kind, shape=(136, 64)):
    weights = np.array(random_weights(shape, scale=1.0))
    if kind == "patched":
        places = RNG.integers(0, weights.size, 50)
        weights.reshape(-1).view(np.uint16)[places] = RNG.integers(0, 65536, 50)
    if kind == "raw":
        weights = RNG.integers(0, 65536, weights.shape, dtype=np.uint16).view(weights.dtype)
    return weights


def corrupt(array, rng):
    """Flips a few bits, or overwrites words, anywhere in the payload."""
    parts = {name: np.array(getattr(array, name)) for name in _layout.PAYLOAD}
    for _ in range(rng.integers(1, 4)):
        words = parts[rng.choice(_layout.PAYLOAD)].reshape(-1)
        at = rng.integers(len(words))
        if rng.integers(3):
            words[at] ^= np.uint32(1) << np.uint32(rng.integers(32))
        else:
            words[at] = rng.integers(2**32, dtype=np.uint32)
    return dataclasses.replace(array, **{k: jnp.asarray(v) for k, v in parts.items()})


@pytest.mark.parametrize("kind", ["plain", "patched", "raw"])
def test_cpu_decoder(kind):
    weights = sample(kind)
    good = df11_jax.compress(weights)
    decompress = jax.jit(df11_jax.decompress)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        try:
            out = np.asarray(decompress(corrupt(good, rng)))
        except jax.errors.JaxRuntimeError as error:
            refused += 1
            assert "DATA_LOSS: df11_decode: 'tensor' is corrupt: " in str(error)
        else:
            np.testing.assert_array_equal(out.view(np.uint16), weights.view(np.uint16))
    assert refused > 200


@pytest.mark.parametrize("kind", ["plain", "patched", "raw"])
def test_xla_decoder(kind):
    weights = sample(kind)
    good = df11_jax.compress(weights)
    rng = np.random.default_rng(1)
    poisoned = 0
    for _ in range(100):
        bad = corrupt(good, rng)
        payload = [part[None] for part in bad.payload]
        out = _xla_decoder.decode(jnp.int32(0), *payload, layout=bad.layout)
        out = np.asarray(out).view(np.uint16)
        poison = out == 0xFFFF
        poisoned += poison.any()
        assert ((out == weights.view(np.uint16)) | poison).all()
    assert poisoned > 60


# What tensors hold, their shapes, how many axes are a stack, and how slices are cut.
CUTS = {
    "plain": ("plain", (136, 64), 0, {}),
    "patched": ("patched", (136, 64), 0, {"steps": 4}),
    "raw": ("raw", (136, 64), 0, {"steps": 2}),
    "matrix": ("patched", (500, 64), 0, {}),
    "along columns": ("patched", (64, 504), 0, {"along_columns": True, "code_bits": 9}),
    "matrices": ("plain", (2, 64, 64), 0, {"batch_axes": 1, "row_axes": 1, "steps": 2}),
    "stack": ("plain", (2, 64, 64), 1, {"steps": 2}),
    "divided": ("plain", (2, 64, 64), 1, {"parts": (2, 1)}),
    "one weight": ("plain", (1,), 0, {}),
    "empty": ("plain", (0, 64), 0, {}),
}


@pytest.mark.parametrize("cut", mostly_slow(CUTS, fast=3))
def test_host_verification_finds_what_decoding_finds(cut):
    kind, shape, stack_axes, options = CUTS[cut]
    weights = sample(kind, shape)
    layout = dataclasses.replace(make_layout(shape[stack_axes:]), **options)
    payload = [part.copy() for part in _host_codec.encode(weights, "w", layout)]

    def problem(check):
        try:
            return check(payload, layout, "w"), None
        except ValueError as error:
            return None, str(error)

    rng = np.random.default_rng(1)
    found = set()
    for part, array in zip(_layout.PAYLOAD, payload, strict=True):
        words = array.reshape(-1)
        # Every word, so every field of every record: a bit of one, all of the next.
        for at in range(len(words)):
            good = words[at]
            bad = rng.integers(2**32) if at % 2 else good ^ np.uint32(1 << rng.integers(32))
            words[at] = bad
            decoded, expected = problem(_host_codec.decode)
            assert problem(_host_codec.verify) == (None, expected), (part, at, bad)
            if expected is None:
                assert_same_bits(decoded, weights)
            else:
                found.add(part)
            # What the digest refuses, decoding refuses.
            assert expected or problem(_host_codec.payload_digest)[1] is None
            words[at] = good
    assert found == set(_layout.PAYLOAD if weights.size else ["header"])
    _host_codec.verify(payload, layout, "w")


def test_messages_name_the_leaf_and_the_chunk():
    params = {"layers": {"query": sample("plain"), "key": sample("plain")}}
    params = jax.tree.map(df11_jax.compress, params)
    bad = params["layers"]["query"]
    params["layers"]["query"] = dataclasses.replace(
        bad, sign_mantissa=bad.sign_mantissa.at[2100].add(1)
    )
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"DATA_LOSS.*df11_decode: 'layers/query' is corrupt: chunk 1 of slice 0",
    ):
        jax.block_until_ready(df11_jax.decompress_params(params))


@pytest.mark.parametrize("word", range(_layout.CODEBOOK_ID))
def test_every_word_of_the_header(word):
    params = {"layers": {"key": df11_jax.compress(sample("plain"))}}
    bad = params["layers"]["key"]
    params["layers"]["key"] = dataclasses.replace(bad, header=bad.header.at[word].add(1))
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"^DATA_LOSS: df11_decode: 'layers/key' is corrupt: slice 0 has ",
    ):
        jax.block_until_ready(df11_jax.decompress_params(params))


def test_unknown_version():
    array = df11_jax.compress(sample("plain"))
    newer = dataclasses.replace(array, header=array.header.at[0].set(3))
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"^DATA_LOSS.*slice 0 has format version 3, but this library reads version 2",
    ):
        jax.block_until_ready(df11_jax.decompress(newer))


def test_codes_longer_than_the_header_allows():
    array = df11_jax.compress(sample("patched"))  # codes of 12 bits
    layout = dataclasses.replace(array.layout, code_bits=11)
    header = _layout.pack_header(layout)
    header[_layout.CODEBOOK_ID :] = array.header[_layout.CODEBOOK_ID :]
    bad = dataclasses.replace(array, header=jnp.asarray(header), layout=layout)
    for check in (_host_codec.decode, _host_codec.verify):
        with pytest.raises(ValueError, match="w: is corrupt: chunk 0 of slice 0"):
            check([np.asarray(part) for part in bad.payload], layout, "w")
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"^DATA_LOSS: df11_decode: 'tensor' is corrupt: the codebook of slice 0",
    ):
        jax.block_until_ready(df11_jax.decompress(bad))
    payload = [part[None] for part in bad.payload]
    out = _xla_decoder.decode(jnp.int32(0), *payload, layout=layout)
    assert (np.asarray(out).view(np.uint16) == 0xFFFF).all()


def test_fields_that_disagree():
    array = df11_jax.compress(sample("plain"))
    with pytest.raises(ValueError, match=r"tensor: sign_mantissa is uint32\[2000\]"):
        df11_jax.decompress(dataclasses.replace(array, sign_mantissa=array.sign_mantissa[:2000]))
    with pytest.raises(ValueError, match="tensor: "):
        df11_jax.decompress(dataclasses.replace(array, layout=make_layout((200, 64))))
    # The same number of weights in another shape: only the header tells.
    not_described = r"^DATA_LOSS.*does not describe a slice"
    with pytest.raises(jax.errors.JaxRuntimeError, match=not_described):
        jax.block_until_ready(
            df11_jax.decompress(dataclasses.replace(array, layout=make_layout((64 * 136,))))
        )


@pytest.mark.parametrize("words", [0, 4, 100])
def test_truncated_exponents(words):
    array = df11_jax.compress(sample("plain"))
    short = dataclasses.replace(array, exponents=array.exponents[:words])
    with pytest.raises(jax.errors.JaxRuntimeError, match="DATA_LOSS"):
        jax.block_until_ready(df11_jax.decompress(short))
