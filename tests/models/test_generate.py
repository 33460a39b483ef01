"""Generation: batches, sampling, stop tokens, streaming; and that compression changes no bit."""

import dataclasses
import itertools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mostly_slow import mostly_slow
from payloads import count_decodes
from runs import BF16, DRAWN, F32, GREEDY, NONE, PROMPTS, assert_same_bits, begin, load, run

import df11_jax
from df11_jax import _ffi, _take, models
from df11_jax._array import is_df11
from df11_jax._layout import TILE_COLS
from df11_jax._product import MOST_FUSED_ROWS
from df11_jax.models import _programs, _transformer, tables
from df11_jax.models._sampling import choose


@pytest.fixture(scope="module")
def llama():
    return load("llama")


# Compressed and plain weights.


@pytest.mark.parametrize("family", families.KINDS)
def test_same_bits_as_with_plain_weights(family, monkeypatch):
    """Decompressed block by block; and passed compressed, as where the CUDA library is."""
    compressed, config = load(family)
    plain, _ = load(family, compress=False)
    # On a CPU, `dot` then decompresses each matrix.
    for module in (_transformer, tables):
        monkeypatch.setattr(module, "can_fuse", lambda stack, rows: rows <= MOST_FUSED_ROWS)
    monkeypatch.setattr(_programs, "PIECE_TOKENS", MOST_FUSED_ROWS)
    expected = run(plain, config, batch=3)
    assert_same_bits(run(compressed, config, batch=3), expected)
    fusing = dataclasses.replace(config, exact=False)
    assert_same_bits(run(compressed, fusing, batch=3), expected)


def test_ranks_and_dtypes_that_users_do_not_let_jax_promote(llama):
    jax.clear_caches()  # of what other tests have patched
    expected = run(*llama)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert_same_bits(run(*llama), expected)


@pytest.mark.parametrize("family", families.KINDS)
def test_what_users_do_not_let_jax_promote_in_other_families(family):
    params, config = load(family)
    tokens, keys = families.prompts(), jax.random.split(jax.random.key(0), 2)
    positions, lengths = np.broadcast_to(np.arange(24), tokens.shape), np.array([24, 24], np.int32)

    def logits(params):
        cache = models.init_cache(config, *tokens.shape)
        x, _ = models.forward(params, tokens, positions, 0, cache, config)
        return models.project(params, x, config)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(logits, params).shape == (*tokens.shape, config.vocab)
        args = params, tokens, lengths, DRAWN, keys, NONE
        state = jax.eval_shape(lambda: models.prefill(*args, 32, config))
        args = state, 5, DRAWN, keys, NONE
        models.decode.trace(params, *args, 8, config)


@pytest.mark.parametrize(
    ("family", "dtype", "batch", "sampling"),
    [("llama", BF16, 1, DRAWN), ("gemma3_text", F32, 2, GREEDY)],
)
@pytest.mark.slow
def test_other_types_and_samples_have_the_same_bits(family, dtype, batch, sampling):
    compressed, config = load(family)
    plain, _ = load(family, compress=False)
    config = dataclasses.replace(config, dtype=dtype)
    assert_same_bits(*(run(params, config, batch, sampling) for params in (compressed, plain)))


@pytest.mark.skipif(
    not _ffi.platforms(_ffi.PRODUCT_TARGET),
    reason="needs the CUDA library: install df11_jax with nvcc on PATH",
)
def test_calls_on_a_gpu():
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    config = models.read_config(families.CONFIGS["llama"] | sizes)
    params = models.load_params(models.RandomSource(config), config)
    state = jax.eval_shape(lambda: begin(params, config).args[1])
    keys = jax.random.split(jax.random.key(0), 1)

    def calls(function, *args):
        lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
        return [text.count(f"@{target}(") for target in (_ffi.PRODUCT_TARGET, _ffi.DECODE_TARGET)]

    rest = (5, GREEDY, keys, NONE, 8)
    # The embedding is decompressed; four products of a block are fused, and that of the head.
    for tied in (False, True):
        tied_or_not = dataclasses.replace(config, tied=tied)
        own = {name: leaf for name, leaf in params.items() if not (tied and name == "lm_head")}
        assert calls(models.decode, own, state, *rest, tied_or_not) == [5, 1]
    exact = dataclasses.replace(config, exact=True)
    assert calls(models.decode, params, state, *rest, exact) == [0, 3]
    # Of all leaves of a block that many tokens are multiplied with, one call decompresses.
    many = np.ones((1, MOST_FUSED_ROWS + 1), np.int32), np.array([2], np.int32)
    assert calls(models.prefill, params, *many, GREEDY, keys, NONE, 64, config) == [1, 2]


@pytest.mark.parametrize("family", families.EACH)
def test_compressed_parameters_are_the_plain_ones(family):
    compressed, plain = load(family)[0], load(family, compress=False)[0]
    report = df11_jax.size_report(compressed)
    assert report.nbytes < 0.8 * report.nbytes_before
    assert_same_bits(df11_jax.decompress_params(compressed), plain)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes of the CPU backend")
@pytest.mark.parametrize(
    ("family", "embeddings"), [("llama", 1), pytest.param("gemma4_text", 2, marks=pytest.mark.slow)]
)
def test_weights_are_decoded_once_a_token(family, embeddings):
    params, config = load(family)
    leaves = jax.tree.leaves(params["layers"], is_leaf=is_df11)
    bands = params["embed_tokens" if config.tied else "lm_head"].shape[1] // TILE_COLS
    # One band of each embedding, each block, and the head.
    blocks = sum(leaf.shape[0] for leaf in leaves if is_df11(leaf))
    assert count_decodes(begin(params, config)) == 5 * (embeddings + blocks + bands)


# Batches.


@pytest.mark.slow
def test_prompts_are_read_in_pieces(monkeypatch):
    params, config = load("gemma3_text")
    config = dataclasses.replace(config, dtype=F32)
    whole = models.generate(params, PROMPTS, config, tokens=5)
    monkeypatch.setattr(_programs, "PIECE_TOKENS", 36 * len(PROMPTS))
    # Another length, for another program.
    assert models.generate(params, PROMPTS, config, tokens=5, length=130) == whole


@pytest.mark.slow
def test_rows_are_what_they_are_alone():
    params, config = load("gemma3_text")
    config = dataclasses.replace(config, dtype=F32)
    together = models.generate(params, PROMPTS, config, tokens=9)
    alone = [models.generate(params, [prompt], config, tokens=9)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(len(row) == 9 for row in together)


@pytest.mark.slow
def test_the_length_of_the_cache_does_not_matter(llama):
    params, config = llama
    config = dataclasses.replace(config, dtype=F32)
    tokens = models.generate(params, PROMPTS, config, tokens=9)
    assert models.generate(params, PROMPTS, config, tokens=9, length=78) == tokens


def test_positions_go_beyond_the_type_of_lengths(llama):
    params, config = llama
    longest = np.iinfo(np.int8).max
    prompts, keys = np.ones((1, longest), np.int32), jax.random.split(jax.random.key(0), 1)
    args, room = (GREEDY, keys, NONE), 4

    def logits(lengths):
        state = models.prefill(params, prompts, lengths, *args, longest + room, config)
        return models.decode(params, state, room, *args, room, config)[0].logits

    expected = logits(np.array([longest], np.int32))
    assert_same_bits(logits(np.array([longest], np.int8)), expected)


def test_drawn_tokens_depend_on_seed_and_row(llama):
    params, config = llama
    sampling = models.Sampling(temperature=2.0)

    def draw(seed, prompts=((1, 2), (1, 2))):
        return models.generate(
            params, prompts, config, tokens=20, seed=seed, sampling=sampling, every=7
        )

    first, second = draw(0)
    assert first != second
    assert draw(0) == [first, second]
    assert draw(1) != [first, second]


# Stop tokens and streaming.


@pytest.mark.parametrize("every", mostly_slow([4, 1, 100]))
def test_stop_tokens_end_their_row(llama, every):
    params, config = llama
    free = models.generate(params, PROMPTS, config, tokens=12)
    stop = [free[0][3], free[1][0]]

    def cut(row):
        ends = [i for i, token in enumerate(row) if token in stop]
        return row[: min(ends)] if ends else row

    parts = []
    stopped = models.generate(
        params, PROMPTS, config, tokens=12, stop=stop, every=every, callback=parts.append
    )
    assert stopped == [cut(row) for row in free]
    assert stopped[1] == [] and len(stopped[0]) <= 3
    assert [list(itertools.chain(*row)) for row in zip(*parts, strict=True)] == stopped


def test_generation_ends_when_all_rows_have(llama):
    params, config = llama
    stop = range(config.vocab)
    parts = []
    assert models.generate(params, [[1]], config, stop=stop, callback=parts.append) == [[]]
    assert parts == []


def test_callback_gets_tokens_as_they_come(llama):
    params, config = llama
    parts = []
    tokens = models.generate(params, [[1, 2]], config, tokens=10, every=4, callback=parts.append)
    assert [len(part[0]) for part in parts] == [1, 4, 4, 1]
    assert [token for part in parts for token in part[0]] == tokens[0]


def test_callbacks_that_never_come_take_no_memory(llama):
    params, config = llama
    tokens = models.generate(params, [[1, 2]], config, tokens=10)
    assert models.generate(params, [[1, 2]], config, tokens=10, every=2**40) == tokens


# Sampling.


def draws(logits, sampling, count=2000):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.bincount(choose(rows, sampling.checked(), keys), minlength=len(logits)) / count


def test_draws_have_the_probabilities_of_the_logits():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(draws(np.log(p), models.Sampling(1.0)), p, atol=0.04)
    squared = p**2 / np.sum(p**2)
    np.testing.assert_allclose(draws(np.log(p), models.Sampling(0.5)), squared, atol=0.04)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (models.Sampling(1.0, top_k=2), [0, 1]),
        (models.Sampling(1.0, top_k=100), [0, 1, 2, 3]),
        (models.Sampling(1.0, top_p=0.79), [0, 1]),
        (models.Sampling(1.0, top_p=0.81), [0, 1, 2]),
        (models.Sampling(1.0, top_p=0.01), [0]),
        (models.Sampling(1.0, top_p=1.0), [0, 1, 2, 3]),
        # Of the two that are left, the first has 0.625.
        (models.Sampling(1.0, top_k=2, top_p=0.6), [0]),
        (models.Sampling(1e-3), [0]),
        (models.Sampling(1e-37), [0]),
        (models.Sampling(1e-40, top_k=3), [0]),
        (models.Sampling(1.0, top_p=1e-40), [0]),
        (models.Sampling(0, top_k=2), [0]),
        (models.Sampling(), [0]),
    ],
)
def test_what_can_be_drawn(sampling, kept):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    order = [2, 0, 3, 1]  # tokens are not in the order of their probabilities
    found = draws(np.log(p[np.argsort(order)]) + 40, sampling)
    assert sorted(np.flatnonzero(found)) == sorted(order[i] for i in kept)


@pytest.mark.parametrize(
    "sampling",
    [
        models.Sampling(0.0),
        models.Sampling(0.0, top_k=3),
        models.Sampling(1e-40, top_p=0.5),
        models.Sampling(jnp.float16(0), top_k=3, top_p=0.5),
    ],
)
def test_a_temperature_of_0_is_the_likeliest_token_in_programs_too(sampling):
    # `prefill` and `decode` get what the user gives, which `generate` would simplify.
    rows = jax.random.normal(jax.random.key(1), (20, 7))
    keys = jax.random.split(jax.random.key(0), 20)
    chosen = jax.jit(lambda *args: choose(*args))(rows, sampling, keys)
    np.testing.assert_array_equal(chosen, np.argmax(rows, axis=-1))


def test_rows_have_numbers_of_their_own():
    rows = jax.random.normal(jax.random.key(1), (4, 7))
    keys, temperature = jax.random.split(jax.random.key(0), 4), np.array([0, 0.5, 1, 9], np.float32)
    top_p, draw = np.array([0.9, 0.5, 0.7, 0.8], np.float32), jax.jit(lambda *args: choose(*args))
    each = models.Sampling(temperature[:, None], top_k=4, top_p=top_p[:, None])
    expected = [
        draw(rows[i : i + 1], models.Sampling(temperature[i], 4, top_p[i]), keys[i : i + 1])[0]
        for i in range(4)
    ]
    np.testing.assert_array_equal(draw(rows, each, keys), expected)
    # Of four tokens that are left, each would have one of these.
    with pytest.raises(
        ValueError, match=r"top_p has shape \(4,\), expected one number, or \[batch"
    ):
        draw(rows, models.Sampling(1.0, top_k=4, top_p=top_p), keys)
    with pytest.raises(ValueError, match=r"temperature has shape \(4,\), expected one number for"):
        models.Sampling(temperature).checked()


def test_other_numbers_cost_no_compilation():
    draw = jax.jit(choose)
    keys = jax.random.split(jax.random.key(0), 1)
    for number in (0.5, 0.9, 1, np.float64(0.3)):
        sampling = models.Sampling(number, top_k=3, top_p=number if number < 1 else 0.5)
        draw(jnp.zeros((1, 5)), sampling.checked(), keys)
    assert draw._cache_size() == 1


def test_lengths_of_the_same_bucket_cost_no_compilation(llama):
    params, config = llama
    programs = []
    for prompt, tokens in ((1, 9), (37, 20), (64, 65)):
        models.generate(params, [[1] * prompt], config, tokens=tokens)
        programs.append((models.prefill._cache_size(), models.decode._cache_size()))
    assert len(set(programs)) == 1


# Embedding and output head in pieces.


@pytest.mark.parametrize(
    ("tokens", "piece"),
    [((3,), 1), ((3,), 3), ((3,), 100), ((), 1), ((2, 3), 3), ((40,), 3), ((3, 200), 100)],
)
def test_tables_in_pieces(monkeypatch, tokens, piece):
    dim, vocab = 64, 5 * TILE_COLS - 37
    jax.clear_caches()  # of pieces of another size
    monkeypatch.setattr(_take, "PIECE_BYTES", piece * 2 * TILE_COLS * dim)
    rng = np.random.default_rng(0)
    plain = rng.standard_normal(tables.table_shape(vocab, dim)).astype(jnp.bfloat16)
    table = df11_jax.compress(plain, stack_axes=1, along_columns=True)
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    expected = plain.reshape(-1, dim)[ids]
    for either in (table, jnp.asarray(plain)):
        rows = jax.jit(tables.look_up)(either, ids)
        assert_same_bits(rows, expected)
        x = rng.standard_normal((*tokens[:1], dim)).astype(np.float32)
        products = jax.jit(tables.project)(either, x)
        exact = x @ plain.reshape(-1, dim).astype(np.float32).T
        np.testing.assert_allclose(products, exact, atol=1e-4)
    if jax.default_backend() == "cpu" and 0 < ids.size < 5:
        assert count_decodes(jax.jit(tables.look_up), table, ids) <= -(-ids.size // piece) * piece


@pytest.mark.slow
def test_tables_that_the_user_compressed():
    # With pairs along rows, as of other matrices.
    plain, config = load("llama", compress=False)
    small = df11_jax.compress_params(plain, stacked=".")
    assert is_df11(small["embed_tokens"]) and not small["embed_tokens"].layout.along_columns
    assert_same_bits(run(small, config, batch=2), run(plain, config, batch=2))


# Errors.


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[1, 300]], {}, r"prompts\[0\] has tokens from 1 to 300, expected 0 to 299"),
        ([[-1]], {}, r"prompts\[0\] has tokens from -1"),
        ([[1]], {"tokens": 0}, "tokens is 0"),
        ([[1]], {"every": 0}, "every is 0"),
        ([[1]], {"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
        ([[1.5]], {}, r"prompts\[0\]: expected integers, got \[1.5\]"),
        ([1, 2], {}, r"prompts\[0\]: expected the tokens of a prompt, got 1"),
        (
            [[1], [1] * 20],
            {"length": 28},
            r"prompts\[1\] has 20 tokens, and 10 more are wanted, but the cache has room for 28",
        ),
        ([[1] * 504], {}, "but the model was made for 512 positions"),
        ([[1]], {"sampling": models.Sampling(-1.0)}, "temperature is -1"),
        ([[1]], {"sampling": models.Sampling(1.0, top_k=0)}, "top_k is 0"),
        ([[1]], {"sampling": models.Sampling(1.0, top_p=0.0)}, "top_p is 0"),
    ],
)
def test_what_cannot_be_generated(llama, prompts, options, message):
    params, config = llama
    with pytest.raises(ValueError, match=message):
        models.generate(params, prompts, config, **({"tokens": 10} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 2.5}, "tokens is 2.5, expected an integer"),
        ({"every": 2.0}, "every is 2.0, expected an integer"),
        ({"length": 64.0}, "length is 64.0, expected an integer"),
        ({"stop": 3}, "stop is 3, expected the tokens that end a row"),
        ({"stop": [7, None]}, r"stop\[1\] is None, expected an integer"),
        ({"stop": "</s>"}, r"stop\[0\] is '<', expected an integer"),
        ({"sampling": models.Sampling(1.0, 2.5)}, "top_k is 2.5, expected an integer"),
    ],
)
def test_numbers_that_are_none(llama, options, message):
    params, config = llama
    with pytest.raises(TypeError, match=message):
        models.generate(params, [[1]], config, **({"tokens": 10} | options))


def test_prompts_that_come_one_by_one_and_a_stop_token_of_no_model(llama):
    params, config = llama
    expected = models.generate(params, [[1], [2]], config, tokens=3)
    prompts = ([i] for i in (1, 2))
    assert models.generate(params, prompts, config, tokens=3, stop=[10**12]) == expected
    for stop in ([-(10**12)], jnp.array([299])):  # as in the arrays that `prefill` takes
        assert models.generate(params, [[1], [2]], config, tokens=3, stop=stop) == expected


@pytest.mark.slow
def test_just_enough_room(llama):
    params, config = llama
    assert len(models.generate(params, [[1] * 503], config, tokens=10)[0]) == 10
    assert len(models.generate(params, [[1] * 20], config, tokens=10, length=29)[0]) == 10
    assert len(models.generate(params, [[1] * 20], config, tokens=1, length=20)[0]) == 1
