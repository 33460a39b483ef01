"""Logits and greedy tokens of every family, as transformers has them."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import transformers_logits
from mostly_slow import mostly_slow

from df11_jax import models
from df11_jax._array import is_df11
from df11_jax.models import _attention, _programs

EXPECTED = np.load(transformers_logits.EXPECTED)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=families.EACH)
def family(request):
    return request.param


def load(family):
    """Compressed parameters, and the configuration for float32."""
    params, config = runs.load(family)
    return params, dataclasses.replace(config, dtype=jnp.float32)


@pytest.fixture
def transformer(family):
    return load(family)


def all_logits(params, config, tokens):
    """Logits at all positions, in one pass."""
    return np.stack(runs.all_logits(params, config, tokens))


def test_logits_are_those_of_transformers(family, transformer):
    logits = all_logits(*transformer, families.prompts())[:, transformers_logits.POSITIONS]
    np.testing.assert_allclose(logits, EXPECTED[f"{family}/logits"], rtol=0, atol=TOLERANCE)


def test_greedy_tokens_are_those_of_transformers(family, transformer):
    params, config = transformer
    prompts = families.prompts().tolist()
    tokens = models.generate(params, prompts, config, tokens=transformers_logits.TOKENS, every=3)
    np.testing.assert_array_equal(tokens, EXPECTED[f"{family}/tokens"])


@families.needs_transformers
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_what_is_expected_here(family, transformer, tmp_path):
    families.skip_unknown(families.CONFIGS[family]["model_type"])
    logits, tokens = transformers_logits.compute(family, tmp_path)
    expected = EXPECTED[f"{family}/logits"]
    np.testing.assert_allclose(
        logits[:, transformers_logits.POSITIONS], expected, rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(tokens, EXPECTED[f"{family}/tokens"])
    np.testing.assert_allclose(
        all_logits(*transformer, families.prompts()), logits, rtol=0, atol=TOLERANCE
    )


# Of 3 rows with 2 key-value heads, each with 40 slots and 10,240 bytes of keys and values: all, but
# not all tokens; two rows, the one in the middle twice; one head, not all tokens; one token.
@pytest.mark.slow
@pytest.mark.parametrize("most", [6 * 10240, 5 * 10240, 10240, 1])
def test_attention_in_parts_is_attention_at_once(most, monkeypatch):
    params, config = load("gemma3_text")
    prompts = families.prompts(batch=3, length=40)
    whole = all_logits(params, config, prompts)
    monkeypatch.setattr(_attention, "PART_BYTES", most)
    parts = all_logits(params, config, prompts)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=TOLERANCE)


# In pieces of 10: the first begins with padding, the second before the first one ends.
@pytest.mark.parametrize("family", mostly_slow(["qwen3_5_text", "gemma4_text"]))
def test_logits_of_prompts_that_are_read_in_pieces(family, monkeypatch):
    monkeypatch.setattr(_programs, "PIECE_TOKENS", 2 * 10)
    params, config = load(family)
    prompts, none = families.prompts(), np.array([], np.int32)
    lengths, keys = np.array([24, 24], np.int32), jax.random.split(jax.random.key(0), 2)
    padded = np.pad(prompts, ((0, 0), (3, 0)))
    state = models.prefill(params, padded, lengths, models.Sampling(), keys, none, 32, config)
    expected = EXPECTED[f"{family}/logits"][:, transformers_logits.POSITIONS.index(23)]
    np.testing.assert_allclose(state.logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", mostly_slow(["llama", "gemma3_text"]))
def test_reading_in_pieces_is_reading_at_once(family):
    params, config = load(family)
    tokens = families.prompts(length=11)

    @jax.jit
    def read(params, piece, positions, begin, cache):
        x, cache = models.forward(params, piece, positions, begin, cache, config)
        return models.project(params, x, config), cache

    cache = models.init_cache(config, *tokens.shape)
    out = []
    for begin, end in ((0, 5), (5, 6), (6, 11)):
        positions = jnp.broadcast_to(jnp.arange(begin, end), (len(tokens), end - begin))
        logits, cache = read(params, tokens[:, begin:end], positions, begin, cache)
        out.append(logits)
    whole = all_logits(params, config, tokens)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), whole, rtol=0, atol=TOLERANCE)


def test_a_token_that_is_not_kept_comes_again():
    params, config = load("mistral")
    tokens = families.prompts(batch=1, length=15)

    @jax.jit
    def read(params):
        cache = models.init_cache(config, 1, 20)
        for begin, end, keep in ((0, 10, 10), (10, 11, 0), (10, 15, 5)):
            piece, positions = tokens[:, begin:end], jnp.arange(begin, end)[None]
            x, cache = models.forward(params, piece, positions, begin, cache, config, keep)
        return models.project(params, x, config)

    (expected,) = all_logits(params, config, tokens)
    np.testing.assert_allclose(read(params)[0], expected[10:], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_longrope_has_short_factors_up_to_the_original_length():
    params, config = load("phi3")
    rope = config.rope
    for length, factors in ((16, rope.short_factors), (17, rope.long_factors)):
        same = dataclasses.replace(rope, short_factors=factors, long_factors=factors)
        same = dataclasses.replace(config, rope=same)
        tokens = families.prompts(length=length)
        logits = all_logits(params, config, tokens)
        np.testing.assert_array_equal(logits, all_logits(params, same, tokens))


def test_layers_must_be_as_many_as_configured():
    params, config = load("llama")
    cache = models.init_cache(config, 1, 4)
    more = dataclasses.replace(config, layers=4, sliding=(False,) * 4)
    tokens = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="params have 3 layers, and 0 in host memory, expected 4"):
        models.forward(params, tokens, tokens, 0, cache, more)


@pytest.mark.parametrize(
    ("module", "leaf", "name"),
    [
        ("o_proj", "bias", "layers/self_attn/o_proj/bias"),  # as for steering
        ("q_norm", "scale", "layers/self_attn/q_norm/scale"),
        (None, None, "lm_head"),  # the embedding would be the head
    ],
)
def test_leaves_that_would_be_left_out(module, leaf, name):
    params, config = load("llama")
    if module is None:
        config = dataclasses.replace(config, tied=True)
    else:
        params = jax.tree.map(lambda x: x, params, is_leaf=is_df11)
        params["layers"]["self_attn"].setdefault(module, {})[leaf] = jnp.ones((3, 16))
    tokens, cache = np.zeros((1, 1), np.int32), models.init_cache(config, 1, 4)
    with pytest.raises(ValueError, match=f"params have {name}, which is not used by a llama"):
        models.forward(params, tokens, tokens, 0, cache, config)


def test_logits_of_tokens_that_the_head_does_not_have():
    params, config = load("llama")
    more, x = dataclasses.replace(config, vocab=321), jnp.zeros((1, config.dim))
    with pytest.raises(ValueError, match="params have 320 rows in lm_head, expected at least 321"):
        models.project(params, x, more)


def test_each_row_has_its_positions():
    params, config = load("llama")
    tokens, cache = families.prompts(), models.init_cache(config, 2, 24)
    for positions in (np.arange(24), np.arange(24)[None]):
        with pytest.raises(ValueError, match=r"positions have the shape .*, expected \(2, 24\)"):
            models.forward(params, tokens, positions, 0, cache, config)


@pytest.mark.parametrize("nowhere", [-1, np.iinfo(np.int64).max])
def test_positions_that_all_tokens_would_attend_to(nowhere):
    params, config = load("llama")
    cache, positions = models.init_cache(config, 1, 4), np.array([[nowhere, 0, 1]])
    with pytest.raises(ValueError, match=r"positions are .*, expected 0 or more, and 2147483647"):
        models.forward(params, np.ones((1, 3), np.int32), positions, 0, cache, config)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (3, "keep is 3, but 2 tokens come"),
        (-1, "keep is -1, but 2 tokens come"),
        (np.array([1, 2]), r"keep has the shape \(2,\), expected one number"),
    ],
)
def test_tokens_to_keep_that_do_not_come(keep, message):
    params, config = load("mistral")
    cache, tokens = models.init_cache(config, 2, 8), np.zeros((2, 2), np.int32)
    with pytest.raises(ValueError, match=message):
        models.forward(params, tokens, tokens, 0, cache, config, keep)
    with pytest.raises(ValueError, match=r"tokens have the shape \(2,\), expected \[batch, seq\]"):
        models.forward(params, tokens[0], tokens[0], 0, cache, config)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"layers": 2, "sliding": (False,) * 2}, ".full.keys"),  # the last layer would share slots
        ({"kv_heads": 4}, ".full.keys"),  # as on four devices, of which two share a head
        ({"dtype": jnp.bfloat16}, ".full.keys"),
        ({"window": 8, "sliding": (False, True, True)}, ".full.keys"),
    ],
)
def test_a_cache_is_that_of_its_configuration(change, name):
    params, config = load("llama")
    cache = models.init_cache(dataclasses.replace(config, **change), 2, 24)
    tokens = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=rf"cache\{name} is uint.*, expected uint32\[3, 2, 2, 24,"):
        models.forward(params, tokens, tokens, 0, cache, config)


@pytest.mark.parametrize(("batch", "slots"), [(1, 24), (5, 24), (2, 6)])
def test_a_cache_is_that_of_its_sequences_with_whole_windows(batch, slots):
    params, config = load("gemma3_text")
    cache = models.init_cache(config, 2, 24)
    other = models.init_cache(config, batch, slots)
    tokens = jnp.zeros((2, 1), jnp.int32)
    cache = cache._replace(sliding=other.sliding)  # of 6 slots, if only full layers got more
    with pytest.raises(ValueError, match=r"cache.sliding.keys is .*, expected .* for 2 sequences"):
        models.forward(params, tokens, tokens, 0, cache, config)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3_5_text"])
def test_gradients_that_would_lack_what_comes_through_the_cache(kind):
    params, config = load(kind)
    tokens = families.prompts()
    positions = np.broadcast_to(np.arange(24), tokens.shape)

    def loss(change, name):
        def scaled(path, leaf):
            path = "." + jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf * change if path.endswith(name) else leaf

        changed = jax.tree.map_with_path(scaled, params, is_leaf=is_df11)
        cache = models.init_cache(config, *tokens.shape)
        x, _ = models.forward(changed, tokens, positions, 0, cache, config)
        return models.project(changed, x, config).sum()

    with pytest.raises(TypeError, match="the blocks of a text model cannot be differentiated"):
        jax.eval_shape(lambda change: jax.grad(loss)(change, "/input_layernorm/scale"), 1.0)
    # What comes after the blocks can be.
    jax.eval_shape(lambda change: jax.grad(loss)(change, ".norm"), 1.0)


@pytest.mark.parametrize(
    ("kind", "slot", "message"),
    [
        ("llama", 5, "slot is 5, and 2 tokens come, but the cache has room for 6"),
        ("llama", np.int64(-1), "slot is -1, and 2 tokens come"),
        ("mistral", 5, "slot is 5, and 2 tokens come, but the cache has room for 6"),
        ("llama", np.array([4, 4]), r"slot has the shape \(2,\), expected one number"),
    ],
)
def test_slots_that_a_cache_does_not_have(kind, slot, message):
    params, config = load(kind)
    cache, tokens = models.init_cache(config, 2, 6), np.zeros((2, 2), np.int32)

    def read(slot, cache):
        return jax.eval_shape(lambda: models.forward(params, tokens, tokens, slot, cache, config))

    with pytest.raises(ValueError, match=message):
        read(slot, cache)
    read(4, cache)
    if kind == "mistral":  # a whole window has room for any number of tokens
        read(slot, models.init_cache(config, 2, 8))
