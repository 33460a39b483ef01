"""Corrupt payloads: the right bits or a clear error, from every decoder, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from payloads import random_weights

import df11_jax
from df11_jax import _layout, _xla_decoder
from df11_jax._layout import make_layout

RNG = np.random.default_rng(0)


def sample(kind):
    weights = np.array(random_weights((136, 64), scale=1.0))
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
            assert "df11_decode: 'tensor'" in str(error)
            assert "DATA_LOSS" in str(error) or "INVALID_ARGUMENT" in str(error)
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


def test_unknown_version():
    array = df11_jax.compress(sample("plain"))
    newer = dataclasses.replace(array, header=array.header.at[0].set(2))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="format version 2, but this library reads version 1"
    ):
        jax.block_until_ready(df11_jax.decompress(newer))


def test_fields_that_disagree():
    array = df11_jax.compress(sample("plain"))
    with pytest.raises(ValueError, match=r"tensor: sign_mantissa is uint32\[2000\]"):
        df11_jax.decompress(dataclasses.replace(array, sign_mantissa=array.sign_mantissa[:2000]))
    with pytest.raises(ValueError, match="tensor: "):
        df11_jax.decompress(dataclasses.replace(array, layout=make_layout((200, 64))))
    # The same number of weights in another shape: only the header tells.
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not describe a slice"):
        jax.block_until_ready(
            df11_jax.decompress(dataclasses.replace(array, layout=make_layout((64 * 136,))))
        )


@pytest.mark.parametrize("words", [0, 4, 100])
def test_truncated_exponents(words):
    array = df11_jax.compress(sample("plain"))
    short = dataclasses.replace(array, exponents=array.exponents[:words])
    with pytest.raises(jax.errors.JaxRuntimeError, match="DATA_LOSS"):
        jax.block_until_ready(df11_jax.decompress(short))
