"""Google's `gemma` package, which nobody here wrote, from compressed parameters.

    pip install ".[test-gemma]"

Its linen model, forward pass, sampler and LoRA, at a small size with random weights.
"""

import importlib.util
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from payloads import assert_same_bits, count_decodes

import df11_jax
from df11_jax.linen import compressed

if not importlib.util.find_spec("gemma"):
    pytest.skip(
        'needs gemma: pip install ".[test-gemma]" into an environment of its own',
        allow_module_level=True,
    )
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the many packages that it imports
    import sentencepiece
    from gemma import gm
    from gemma.gm.nn import _config, _modules

pytestmark = pytest.mark.filterwarnings("default")

LAYERS, VOCAB = 3, 512
TENSORS = 5  # compressed, of a block
LOCAL, GLOBAL = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL


@pytest.fixture(scope="module")
def model():
    config = _config.TransformerConfig(
        num_embed=VOCAB,
        embed_dim=128,
        hidden_dim=512,
        num_heads=4,
        head_dim=64,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(LOCAL, LOCAL, GLOBAL),
        sliding_window_size=8,
        transpose_gating_einsum=True,
    )
    return gm.nn.Gemma3_270M(config=config)


@pytest.fixture(scope="module")
def tokens():
    return jnp.arange(1, 25, dtype=jnp.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def params(model, tokens):
    plain = model.init(jax.random.key(0), tokens)["params"]
    return plain, df11_jax.compress_params(plain)


@pytest.fixture(params=["as it is", "by block"])
def kind(request, monkeypatch):
    """Their modules as they are, or with two of their classes wrapped."""
    jax.clear_caches()  # the model is one and the same to their nn.jit
    if request.param == "by block":
        monkeypatch.setattr(_modules, "Block", compressed(_modules.Block))
        embedder = compressed(_modules.Embedder, methods=("encode", "decode"))
        monkeypatch.setattr(_modules, "Embedder", embedder)
    return request.param


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Their tokenizer, of a small vocabulary."""
    prefix = str(tmp_path_factory.mktemp("tokenizer") / "small")
    sentencepiece.SentencePieceTrainer.train(
        input=str(pathlib.Path(__file__).resolve().parents[1] / "LICENSE"),
        model_prefix=prefix,
        vocab_size=VOCAB,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return gm.text.Gemma3Tokenizer(path=prefix + ".model")


def test_same_logits(model, params, tokens, kind):
    plain, small = params
    assert df11_jax.size_report(small).nbytes < 0.67 * df11_jax.size_report(plain).nbytes

    def forward(params, tokens):
        return model.apply({"params": params}, tokens).logits

    run = jax.jit(forward)
    assert_same_bits(run(small, tokens), run(plain, tokens))
    if jax.default_backend() == "cpu":
        assert count_decodes(run, small, tokens) == LAYERS * TENSORS + 1
        calls = run.lower(small, tokens).as_text().count("@df11_decode")
        assert calls == (LAYERS + 2 if kind == "by block" else LAYERS * TENSORS + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_same_text_from_their_sampler(model, params, tokenizer, kind, stream):
    def sample(params):
        sampler = gm.text.Sampler(
            model=model,
            params=params,
            tokenizer=tokenizer,
            sampling=gm.text.RandomSampling(),
            cache_length=64,
            max_out_length=32,
            pad_length=16,
        )
        options = {"max_new_tokens": 12, "rng": 0, "return_state": True, "stream": stream}
        if stream:
            return [out.state for out in sampler.sample("the license", **options)][-1]
        return sampler.sample(["the license", "you may"], **options).state

    plain, _ = params
    # Their sampler makes a cache of the dtype that the first array of all has, which here would
    # be a part of the compressed embedding.
    small = df11_jax.compress_params(plain, include="^layer_")
    expected, actual = sample(plain), sample(small)
    assert (expected.predicted_tokens != 0).any()
    np.testing.assert_array_equal(actual.predicted_tokens, expected.predicted_tokens)
    jax.tree.map(np.testing.assert_array_equal, actual.cache, expected.cache)


def test_same_gradients_of_their_lora(model, params, tokens, kind):
    adapted = gm.nn.LoRA(rank=4, model=model)
    everything = adapted.init(jax.random.key(0), tokens)["params"]
    everything, adapters = split_lora(everything)
    draws = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(adapters))))
    adapters = jax.tree.map(
        lambda a: 0.02 * jax.random.normal(next(draws), a.shape, a.dtype), adapters
    )

    def loss(adapters, params):
        logits = adapted.apply({"params": merge(params, adapters)}, tokens).logits
        return jnp.sum(jnp.square(logits.astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(adapters, everything)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(expected))
    actual = gradient(adapters, df11_jax.compress_params(everything))
    jax.tree.map(assert_same_bits, actual, expected)


def split_lora(params):
    """Parameters without those named "lora", and those alone."""
    rest, adapters = {}, {}
    for name, value in params.items():
        if name == "lora":
            adapters[name] = value
        elif isinstance(value, dict):
            rest[name], adapters[name] = split_lora(value)
        else:
            rest[name] = value
    return rest, adapters


def merge(params, adapters):
    merged = dict(params)
    for name, value in adapters.items():
        merged[name] = value if name == "lora" else merge(params[name], value)
    return merged
