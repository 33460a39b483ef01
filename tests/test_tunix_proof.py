"""Google's Tunix, which nobody here wrote, from compressed parameters.

    pip install ".[test-tunix]"

Its NNX models, forward pass, sampler and LoRA, at small sizes with random weights.
"""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from payloads import assert_same_bits, count_decodes

import df11_jax
from df11_jax.nnx import CompressedParam, compress

if not importlib.util.find_spec("tunix"):
    pytest.skip(
        'needs google-tunix: pip install ".[test-tunix]" into an environment of its own',
        allow_module_level=True,
    )
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the many packages that it imports
    import tunix
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

pytestmark = pytest.mark.filterwarnings("default")

LAYERS, VOCAB = 2, 256
TENSORS = 7  # compressed, of a layer
SIZES = {
    "num_layers": LAYERS,
    "vocab_size": VOCAB,
    "embed_dim": 128,
    "hidden_dim": 256,
    "num_heads": 4,
    "head_dim": 64,
    "num_kv_heads": 2,
    "norm_eps": 1e-5,
    "rope_theta": 500_000,
}


class ByteTokenizer:
    """Bytes, with the methods that the sampler asks for."""

    def encode(self, text, **_):
        return [byte % VOCAB for byte in text.encode()]

    def decode(self, ids, **_):
        return bytes(int(i) for i in ids).decode(errors="replace")

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def make(name):
    """A model with bfloat16 weights, none of them zero."""
    if name == "llama3":
        model = llama3.Llama3(llama3.ModelConfig(**SIZES), rngs=nnx.Rngs(0))
    else:
        model = qwen3.Qwen3(qwen3.ModelConfig(**SIZES, use_tied_embedding=True), rngs=nnx.Rngs(0))
    draws = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    drawn = jax.tree.map(
        lambda w: jnp.asarray(w + 0.02 * draws.standard_normal(w.shape), jnp.bfloat16), state
    )
    nnx.update(model, drawn)
    return model


@nnx.jit
def forward(model, tokens):
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    # Some of them give float32 logits, of which these are the halves.
    return jax.lax.bitcast_convert_type(model(tokens, positions, None, mask)[0], jnp.bfloat16)


@pytest.fixture(params=["llama3", "qwen3"])
def name(request):
    return request.param


@pytest.fixture
def tokens():
    return jnp.arange(1, 25, dtype=jnp.int32).reshape(2, 12)


def test_same_logits(name, tokens):
    model = make(name)
    expected = forward(model, tokens)
    compress(model)
    assert_same_bits(forward(model, tokens), expected)
    report = df11_jax.size_report(nnx.state(model))
    assert report.nbytes < 0.68 * report.nbytes_before
    if jax.default_backend() == "cpu":
        tensors = len(nnx.to_flat_state(nnx.state(model, CompressedParam)))
        assert tensors >= LAYERS * TENSORS + 1
        assert count_decodes(forward, model, tokens) == tensors


def test_same_tokens_from_their_sampler(name):
    def sample(model):
        sampler = tunix.Sampler(
            model,
            ByteTokenizer(),
            tunix.CacheConfig(
                cache_size=64, num_layers=LAYERS, num_kv_heads=2, head_dim=SIZES["head_dim"]
            ),
        )
        return sampler(
            ["the license", "you may"],
            max_generation_steps=10,
            temperature=0.9,
            top_p=0.95,
            seed=0,
        )

    model = make(name)
    expected = sample(model)
    compress(model)
    actual = sample(model)
    assert actual.text == expected.text
    for mine, theirs in zip(actual.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(mine, theirs)
