"""Linen models from compressed parameters: the same bits, under other transformations too."""

import functools
import subprocess
import sys

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_models import (
    LAYERS,
    PLAIN,
    SCAN,
    TOKENS,
    WIDTH,
    WRAPPED,
    Compact,
    Embed,
    Setup,
    Stack,
    bf16,
    generate,
    init,
    make,
    tied,
)
from mostly_slow import mostly_slow
from payloads import assert_same_bits, random_weights

from df11_jax import DF11Array, compress, compress_params, size_report
from df11_jax.linen import compressed, scan

kinds = pytest.mark.parametrize("kind", mostly_slow(WRAPPED))


@pytest.fixture
def tokens():
    return TOKENS


# What is computed.


@pytest.mark.parametrize(
    ("kind", "block"),
    mostly_slow([*((kind, Compact) for kind in WRAPPED), ("nn.scan", Setup), ("unrolled", Setup)]),
)
def test_same_parameters_and_same_bits(kind, block, tokens):
    model, plain_model, plain, variables = make(kind, block)
    assert size_report(variables).nbytes < 0.7 * size_report(plain).nbytes
    again = init(model)
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    jax.tree.map(assert_same_bits, again, plain)

    expected = jax.jit(plain_model.apply)(plain, tokens)
    assert_same_bits(jax.jit(model.apply)(variables, tokens), expected)
    assert_same_bits(jax.jit(model.apply)(plain, tokens), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unrolled", "scan", "unwrapped unrolled"])
def test_eager(kind, tokens):
    model, plain_model, plain, variables = make(kind)
    assert_same_bits(model.apply(variables, tokens), plain_model.apply(plain, tokens))


@kinds
def test_same_tokens(kind, tokens):
    model, plain_model, plain, variables = make(kind)
    run = jax.jit(generate, static_argnums=0)
    np.testing.assert_array_equal(run(model, variables, tokens), run(plain_model, plain, tokens))


@tied
def test_dropout_draws_the_same(kind, tokens):
    model, plain_model, plain, variables = make(kind)

    def run(model, variables):
        rngs = {"dropout": jax.random.key(1)}
        return jax.jit(lambda v: model.apply(v, tokens, deterministic=False, rngs=rngs))(variables)

    assert_same_bits(run(model, variables), run(plain_model, plain))


@pytest.mark.slow
@tied
def test_other_collections_come_out(kind, tokens):
    model, plain_model, plain, variables = make(kind)

    def run(model, variables, mutable):
        return jax.jit(lambda v: model.apply(v, tokens, mutable=mutable))(variables)[1]

    expected = run(plain_model, plain, ["intermediates"])
    jax.tree.map(assert_same_bits, run(model, variables, ["intermediates"]), expected)
    everything = run(model, variables, True)
    jax.tree.map(assert_same_bits, everything["intermediates"], expected["intermediates"])
    assert set(everything) <= {"intermediates", "params"}


@pytest.mark.parametrize(
    "wrap",
    mostly_slow(
        [
            lambda block: nn.scan(nn.remat(compressed(block), static_argnums=(3,)), **SCAN),
            lambda block: scan(nn.remat(block, static_argnums=(3,)), **SCAN),
            lambda block: scan(compressed(block), **SCAN),
            lambda block: nn.jit(scan(block, **SCAN), static_argnums=(3,)),
        ]
    ),
)
def test_other_transforms(wrap, tokens):
    plain = init(PLAIN["scan"](Compact))
    model = Stack(wrap(Compact))
    expected = jax.jit(PLAIN["scan"](Compact).apply)(plain, tokens)
    assert_same_bits(
        jax.jit(model.apply)(compress_params(plain, stacked="/layers/"), tokens), expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"reverse": True}, {"unroll": 2}, {"unroll": LAYERS}])
def test_options_of_scan(options, tokens):
    plain_model = Stack(nn.scan(Compact, **SCAN, **options))
    plain = init(PLAIN["scan"](Compact))
    model = Stack(scan(Compact, **SCAN, **options))
    assert_same_bits(
        jax.jit(model.apply)(compress_params(plain, stacked="/layers/"), tokens),
        jax.jit(plain_model.apply)(plain, tokens),
    )


class Transposed(nn.Module):
    """A layer that multiplies with the transpose of its parameter, as tied autoencoders do."""

    @nn.compact
    def __call__(self, x, _):
        def transpose(variables):
            return jax.tree.map(jnp.transpose, variables)

        is_first = self.is_initializing()
        dense = nn.map_variables(nn.Dense, "params", transpose, transpose, init=is_first)
        return dense(WIDTH, use_bias=False, **bf16)(x), None


@pytest.mark.parametrize("is_scanned", [False, True])
def test_parameters_that_a_module_maps(is_scanned):
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
    model = nn.scan(Transposed, **options) if is_scanned else Transposed
    ours = scan(Transposed, **options) if is_scanned else compressed(Transposed)
    x = random_weights((2, WIDTH), scale=1)
    plain = init(model(), x, None)
    small = compress_params(plain, stacked="." if is_scanned else None)
    expected, _ = jax.jit(model().apply)(plain, x, None)
    assert_same_bits(jax.jit(ours().apply)(small, x, None)[0], expected)


class Counting(nn.Module):
    """A layer with a collection of its own."""

    @nn.compact
    def __call__(self, x, _):
        count = self.variable("counts", "count", jnp.zeros, (1, 2))
        count.value += 1
        return x + nn.Dense(WIDTH, **bf16)(x), None


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"variable_axes": {"params": 0, nn.DenyList("params"): 1}}, (1, LAYERS, 2)),
        ({"variable_axes": {"params": 0}, "variable_carry": nn.DenyList("params")}, (1, 2)),
        (
            {
                "variable_axes": {"params": 0},
                "variable_broadcast": nn.DenyList(["params", "counts"]),
                "variable_carry": "counts",
            },
            (1, 2),
        ),
    ],
)
def test_filters_that_name_all_collections_but_some(options, shape):
    options |= {"split_rngs": {"params": True}, "length": LAYERS}
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    every = {"variable_axes": {True: 0}, "split_rngs": {"params": True}, "length": LAYERS}
    params = init(nn.scan(Counting, **every)(), x, None)["params"]
    plain = {"params": params, "counts": {"count": jnp.zeros(shape)}}
    small = plain | {"params": compress_params(plain["params"], stacked=".")}
    run = lambda model, variables: jax.jit(model.apply, static_argnames="mutable")(  # noqa: E731
        variables, x, None, mutable="counts"
    )
    (expected, _), counts = run(nn.scan(Counting, **options)(), plain)
    (actual, _), actual_counts = run(scan(Counting, **options)(), small)
    assert_same_bits(actual, expected)
    assert actual_counts["counts"]["count"].tobytes() == counts["counts"]["count"].tobytes()


class Sharing(nn.Module):
    """Refers to modules of its parent: one with parameters, one without."""

    dense: nn.Module
    dropout: nn.Module

    @nn.compact
    def __call__(self, x, _):
        x = self.dropout(self.dense(x), deterministic=True)
        return self.dense(nn.Dense(WIDTH, use_bias=False, **bf16)(x)), None


@pytest.mark.parametrize("frozen", [False, True])
def test_modules_that_are_shared(frozen):
    class Parent(nn.Module):
        sharing: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(WIDTH, use_bias=False, **bf16)
            dropout = nn.Dropout(0.5)
            for _ in range(2):
                x, _ = self.sharing(dense, dropout)(x, None)
            return x

    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    plain = init(Parent(Sharing), x)
    assert len(plain["params"]) == 3
    variables = compress_params(flax.core.freeze(plain) if frozen else plain)
    model = Parent(compressed(Sharing))
    expected = jax.jit(Parent(Sharing).apply)(plain, x)
    assert_same_bits(jax.jit(model.apply)(variables, x), expected)
    assert_same_bits(jax.jit(model.apply)(plain, x), expected)


def test_a_scan_that_shares():
    class Parent(nn.Module):
        scan: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return self.scan(nn.Dense(WIDTH, use_bias=False, **bf16), nn.Dropout(0.5))(x, None)[0]

    options = SCAN | {"in_axes": nn.broadcast}
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    plain_model = Parent(nn.scan(Sharing, **options))
    plain = init(plain_model, x)
    variables = compress_params(plain, stacked=".")
    assert_same_bits(
        jax.jit(Parent(scan(Sharing, **options)).apply)(variables, x),
        jax.jit(plain_model.apply)(plain, x),
    )


@pytest.mark.parametrize("transform", [compressed, lambda dense: dense])
def test_vmap(transform, tokens):
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    dense = functools.partial(nn.Dense, 4 * WIDTH, use_bias=False, **bf16)
    plain_model = nn.vmap(nn.Dense, **options)(4 * WIDTH, use_bias=False, **bf16)
    x = jax.random.normal(jax.random.key(1), (3, 2, WIDTH), jnp.bfloat16)
    plain = init(plain_model, x)
    model = nn.vmap(transform(dense), **options)()
    variables = compress_params(plain, stacked=".")
    expected = jax.jit(plain_model.apply)(plain, x)
    assert_same_bits(jax.jit(model.apply)(variables, x), expected)


@pytest.mark.slow
def test_layers_within_layers(tokens):
    inner = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
    inner["in_axes"] = (nn.broadcast, nn.broadcast)

    def nested(outer_scan, inner_scan):
        return Stack(outer_scan(inner_scan(Compact, **inner), **(SCAN | {"length": 2})))

    plain_model = nested(nn.scan, nn.scan)
    plain = init(plain_model)
    once = compress_params(plain, include="layers")
    twice = {
        "params": {
            "embed": plain["params"]["embed"],
            "layers": jax.tree.map(
                lambda w: w if w.size < 2**14 else compress(w, stack_axes=2),
                plain["params"]["layers"],
            ),
        }
    }
    expected = jax.jit(plain_model.apply)(plain, tokens)
    for model in (nested(scan, scan), nested(nn.scan, scan), nested(nn.scan, nn.scan)):
        assert_same_bits(jax.jit(model.apply)(twice, tokens), expected)
    with pytest.raises(ValueError, match=r"^layers/.*kernel: .*has no stack axis"):
        nested(scan, scan).apply(once, tokens)


def test_modules_that_round_float32_parameters_themselves(tokens):
    class Model(nn.Module):
        embed: type[nn.Module] = nn.Embed

        @nn.compact
        def __call__(self, tokens):
            embed = self.embed(256, WIDTH, dtype=jnp.bfloat16, name="embed")
            x = nn.RMSNorm(dtype=jnp.bfloat16)(embed(tokens))
            return embed.attend(nn.Dense(WIDTH, dtype=jnp.bfloat16)(x))

    plain = init(Model(), tokens)
    with pytest.warns(UserWarning, match="compressed nothing: .* 2 leaves .* float32"):
        assert compress_params(plain)["params"]["embed"] == plain["params"]["embed"]
    variables = compress_params(plain, cast=True)
    assert size_report(variables).nbytes < 0.35 * size_report(plain).nbytes
    expected = jax.jit(Model().apply)(plain, tokens)
    for embed in (nn.Embed, Embed):
        assert_same_bits(jax.jit(Model(embed).apply)(variables, tokens), expected)


@pytest.mark.slow
def test_parameters_that_all_layers_share(tokens):
    options = {"variable_broadcast": "params", "split_rngs": {"params": False}, "length": 3}
    options["in_axes"] = (nn.broadcast, nn.broadcast)
    options["variable_axes"] = {"intermediates": 0}
    plain_model = Stack(nn.scan(Compact, **options))
    plain = init(plain_model)
    variables = compress_params(plain)
    expected = jax.jit(plain_model.apply)(plain, tokens)
    model = Stack(scan(Compact, **options), embed=Embed)
    assert_same_bits(jax.jit(model.apply)(variables, tokens), expected)


def test_a_class_decorator_and_a_partial():
    @compressed
    class Layer(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.features, use_bias=False, **bf16)(x)

    assert Layer.__name__ == "Layer"
    assert Layer.__module__ == __name__
    assert scan(Compact, **SCAN).__name__ == nn.scan(Compact, **SCAN).__name__
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    model = compressed(functools.partial(Layer, features=2 * WIDTH))()
    plain = init(model, x)
    assert set(plain["params"]) == {"Dense_0"}
    assert_same_bits(model.apply(compress_params(plain), x), model.apply(plain, x))


# Errors.


def test_only_module_classes():
    with pytest.raises(TypeError, match=r"expected a class of flax.linen modules, got .*Dense"):
        compressed(nn.Dense(3))
    with pytest.raises(TypeError, match="expected a class"):
        scan(lambda x: x, variable_axes={"params": 0})


def test_methods_may_be_none_as_in_flax():
    """Which is the default of `nn.scan`: a program's own wrapper may pass it on."""
    table = random_weights((256, 128))
    embed = compressed(nn.Embed, methods=None)(256, 128, param_dtype=jnp.bfloat16)
    params = compress_params({"embedding": table})
    assert isinstance(params["embedding"], DF11Array)
    rows = embed.apply({"params": params}, jnp.array([3, 7]))
    assert_same_bits(rows, table[jnp.array([3, 7])])

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(128, use_bias=False, param_dtype=jnp.bfloat16)(x), None

    options = {"variable_axes": {"params": 0}, "length": 2, "methods": None}
    kernel = random_weights((2, 128, 128))
    small = compress_params({"Dense_0": {"kernel": kernel}}, stacked=".")
    x = jnp.ones((1, 128), jnp.bfloat16)
    y, _ = scan(Block, **options)().apply({"params": small}, x, None)
    plain, _ = nn.scan(Block, **options)().apply(
        {"params": {"Dense_0": {"kernel": kernel}}}, x, None
    )
    assert_same_bits(y, plain)


@pytest.mark.parametrize("methods", ["attend", {"attend": {"reverse": True}}, 3])
def test_methods_are_a_sequence_of_names(methods):
    with pytest.raises(TypeError, match=r"methods: expected names, such as .*, got .*(attend|3)"):
        compressed(nn.Embed, methods=methods)
    with pytest.raises(TypeError, match="methods: expected names"):
        scan(nn.Embed, methods=methods, variable_axes={"params": 0})


def test_layers_that_are_not_stacked(tokens):
    model, plain_model, plain, _ = make("scan")
    variables = compress_params(plain)
    with pytest.raises(
        ValueError, match=r"^layers/attention/key/kernel: .*has no stack axis.*stacked=\.\.\."
    ):
        model.apply(variables, tokens)
    with pytest.raises(ValueError, match=r"DF11Array.*cannot be mapped over axis 0"):
        plain_model.apply(variables, tokens)


def test_stacks_where_no_layers_are(tokens):
    variables = compress_params(init(PLAIN["unrolled"](Compact)))
    kernel = variables["params"]["layers_1"]["up"]["kernel"]
    variables["params"]["layers_1"]["up"]["kernel"] = jax.tree.map(lambda a: a[None], kernel)
    for kind in ("unrolled", "unwrapped unrolled"):
        with pytest.raises(
            flax.errors.ScopeParamShapeError, match=r"layers_1.*up.*\(1, 128, 512\)"
        ):
            WRAPPED[kind](Compact).apply(variables, tokens)


def test_stacks_of_different_lengths(tokens):
    model, _, _, variables = make("scan")
    layers = variables["params"]["layers"]
    layers = layers | {"up": jax.tree.map(lambda a: a[:3], layers["up"])}
    with pytest.raises(
        ValueError, match=r"^layers/up/kernel: expected 4 layers, like layers/attention/.*, got 3"
    ):
        model.apply({"params": variables["params"] | {"layers": layers}}, tokens)


def test_flax_is_imported_only_where_it_is_asked_for():
    code = "import sys, df11_jax; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("first", ["df11_jax", "flax"])
def test_modules_take_compressed_parameters_without_an_import(first):
    """However these are made, also before Flax is imported."""
    code = """
import sys, jax, jax.numpy as jnp, numpy as np, df11_jax

def make():
    return {"params": {"kernel": df11_jax.compress(kernel), "bias": kernel[0]}}

kernel = jax.random.normal(jax.random.key(0), (128, 256), jnp.bfloat16)
early = make() if sys.argv[1] == "df11_jax" else None
import flax.linen as nn
dense = nn.Dense(256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
x = jnp.ones((2, 128), jnp.bfloat16)
expected = dense.apply({"params": {"kernel": kernel, "bias": kernel[0]}}, x)
result = dense.apply(early or make(), x)
assert "df11_jax.linen" not in sys.modules
np.testing.assert_array_equal(*(np.asarray(y).view(np.uint16) for y in (result, expected)))
"""
    subprocess.run([sys.executable, "-P", "-c", code, first], check=True)
