"""Products in Flax's modules that multiply without decompressing."""

import copy
import dataclasses
import gc
import pickle

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gpu_programs import count_calls, needs_product
from linen_models import LAYERS, SCAN, TENSORS, TOKENS, WIDTH, Compact, Stack, bf16, init
from mostly_slow import mostly_slow
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
import df11_jax.linen
import df11_jax.nnx
from df11_jax import _module_products, _product, _reads
from df11_jax.linen import compressed, scan

ATTENTION = {"row_axes": {"query|key|value": 1}, "along_columns": "embedding"}
FUSED_EMBED = compressed(nn.Embed, methods=("__call__", "attend"), fused=True)
LINEN = {
    "scan": lambda: Stack(scan(Compact, fused=True, **SCAN), embed=FUSED_EMBED),
    "nn.scan": lambda: Stack(nn.scan(compressed(Compact, fused=True), **SCAN), embed=FUSED_EMBED),
    "unrolled": lambda: Stack(compressed(Compact, fused=True), True, FUSED_EMBED),
    "whole": lambda: compressed(Stack, fused=True)(Compact, True),
}
styles = pytest.mark.parametrize("style", mostly_slow(LINEN))


def make(style):
    """A model that multiplies fused, the plain one, and parameters of both."""
    is_unrolled = style in ("unrolled", "whole")
    plain_model = Stack(Compact, True) if is_unrolled else Stack(nn.scan(Compact, **SCAN))
    plain = init(plain_model)
    stacked = None if is_unrolled else "/layers/"
    small = df11_jax.compress_params(plain, stacked=stacked, **ATTENTION)
    return LINEN[style](), plain_model, plain, small


@pytest.fixture
def fused_products(monkeypatch):
    """Has products be `dot`s, which decompresses first on a CPU; lists their shapes."""
    shapes = []

    def dot(x, a, **options):
        y = df11_jax.dot(x, a, **options)
        shapes.append((x.shape, y.shape))
        return y

    monkeypatch.setattr(_module_products, "can_fuse", lambda stack, rows: rows <= 32)
    monkeypatch.setattr(_module_products, "dot", dot)
    return shapes


# linen


@styles
def test_linen(style, fused_products):
    model, plain_model, plain, small = make(style)
    again = init(model)
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    jax.tree.map(assert_same_bits, again, plain)
    assert not fused_products

    expected = jax.jit(plain_model.apply)(plain, TOKENS)
    assert_same_bits(jax.jit(model.apply)(small, TOKENS), expected)
    each = len(fused_products) - 1  # a scan is traced more than once
    assert (
        each == LAYERS * TENSORS if style in ("unrolled", "whole") else each % TENSORS == 0 < each
    )
    assert {y[len(TOKENS.shape) :] for _, y in fused_products} == {(WIDTH,), (4 * WIDTH,), (256,)}
    assert_same_bits(jax.jit(model.apply)(plain, TOKENS), expected)


@needs_product
@styles
def test_linen_on_a_gpu(style):
    model, _, _, small = make(style)
    layers = LAYERS if style in ("unrolled", "whole") else 1
    # The table is decompressed for the look-up of tokens, and for nothing else.
    assert count_calls(model.apply, small, TOKENS) == [layers * TENSORS + 1, 1]
    many = jnp.zeros((1, _product.MOST_FUSED_ROWS + 1), jnp.int32)
    assert count_calls(model.apply, small, many)[0] == 0


@pytest.mark.slow
def test_linen_gradients(fused_products):
    model, plain_model, plain, small = make("scan")
    x = jnp.ones((2, 3, WIDTH), jnp.bfloat16)

    def gradient(model, variables):
        layers = {"params": variables["params"]["layers"]}
        run = lambda x: model.stack().apply(layers, x, None, True)[0]  # noqa: E731
        return jax.jit(jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32))))(x)

    plain_model = Stack(nn.scan(nn.remat(Compact, static_argnums=(2, 3)), **SCAN))
    assert_same_bits(gradient(model, small), gradient(plain_model, plain))
    assert len(fused_products) >= TENSORS


TABLE = (1024, 128)  # 16 bands
TOKENS_OF_TABLE = jnp.array([[3, 1023, 70], [5, -1, 2000]])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_look_ups_of_linen_decompress_bands(dtype):
    options = {"dtype": dtype, "param_dtype": jnp.bfloat16}
    plain = {"params": {"embedding": random_weights(TABLE)}}
    small = df11_jax.compress_params(plain, along_columns="embedding")
    embed, expected = FUSED_EMBED(*TABLE, **options), nn.Embed(*TABLE, **options)
    look_up = jax.jit(embed.apply)
    rows = look_up(small, TOKENS_OF_TABLE)
    assert rows.dtype == dtype
    assert rows.tobytes() == expected.apply(plain, TOKENS_OF_TABLE).tobytes()
    assert count_decodes(look_up, small, TOKENS_OF_TABLE) == TOKENS_OF_TABLE.size
    many = jnp.arange(100)
    assert look_up(small, many).tobytes() == expected.apply(plain, many).tobytes()
    with pytest.raises(ValueError, match="Input type must be an integer"):
        embed.apply(small, jnp.ones(3))
    # With pairs along rows, all of it.
    along_rows = df11_jax.compress_params(plain)
    assert count_decodes(look_up, along_rows, TOKENS_OF_TABLE) == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_look_ups_of_nnx_decompress_bands(dtype):
    embed = nnx.Embed(*TABLE, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    expected = embed(TOKENS_OF_TABLE)
    df11_jax.nnx.compress(embed, fused=True)
    look_up = nnx.jit(lambda embed, tokens: embed(tokens))
    rows = look_up(embed, TOKENS_OF_TABLE)
    assert rows.dtype == dtype
    assert rows.tobytes() == expected.tobytes()
    assert count_decodes(look_up, embed, TOKENS_OF_TABLE) == TOKENS_OF_TABLE.size
    with pytest.raises(ValueError, match="Input type must be an integer"):
        embed(jnp.ones(3))


class Scaled(nn.Embed):
    def __call__(self, inputs, offset=0):
        return super().__call__(inputs + offset) * 8

    def attend(self, query):
        return super().attend(query) + 1


def by_largest(*arrays, dtype=None, inexact=True):
    del dtype, inexact
    return [array / jnp.max(jnp.abs(array)) for array in arrays]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")
def test_methods_of_subclasses_are_called(fused_products):
    plain = {"params": {"embedding": random_weights(TABLE)}}
    small = df11_jax.compress_params(plain, along_columns="embedding")
    model = compressed(Scaled, methods=("__call__", "attend"), fused=True)(*TABLE, **bf16)
    expected = Scaled(*TABLE, **bf16)
    tokens = jnp.array([3, 200])
    look_up = jax.jit(lambda variables: model.apply(variables, tokens, 5))
    assert_same_bits(look_up(small), expected.apply(plain, tokens, 5))
    assert count_decodes(look_up, small) == 2
    query = random_weights((2, TABLE[1]), 1)
    attended = jax.jit(lambda variables: model.apply(variables, query, method="attend"))(small)
    assert_same_bits(attended, expected.apply(plain, query, method="attend"))
    assert fused_products
    # What looks at all of the table gets it.
    own = bf16 | {"promote_dtype": by_largest}
    rows = FUSED_EMBED(*TABLE, **own).apply(small, tokens)
    assert_same_bits(rows, nn.Embed(*TABLE, **own).apply(plain, tokens))


def twice(next_method, args, kwargs, context):
    y = next_method(*args, **kwargs)
    return 2 * y if context.method_name in ("__call__", "attend") else y


class Intercepted(nn.Module):
    """A module that has its own interceptor of calls of others."""

    @nn.compact
    def __call__(self, tokens, _=None):
        embed = nn.Embed(*TABLE, name="embed", **bf16)
        with nn.intercept_methods(twice):
            x = nn.Einsum((128, 256), "td,dh->th", name="einsum", **bf16)(embed(tokens))
            x = nn.Dense(128, name="dense", **bf16)(x)
            scores = embed.attend(x)
        return tokens, scores + embed.attend(x)


@pytest.mark.parametrize("is_scanned", [False, True])
def test_interceptors_of_ones_own_are_called(is_scanned, fused_products):
    model, ours = Intercepted, compressed(Intercepted, fused=True)
    if is_scanned:
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        model, ours = nn.scan(model, **options), scan(model, fused=True, **options)
    tokens = jnp.array([3, 1023, 70])
    plain = init(model(), tokens, None)
    stacked = "." if is_scanned else None
    small = df11_jax.compress_params(plain, along_columns="embed", stacked=stacked)
    expected = jax.jit(model().apply)(plain, tokens, None)[1]
    assert_same_bits(jax.jit(ours().apply)(small, tokens, None)[1], expected)
    assert {y[-1] for _, y in fused_products} == {
        128,
        TABLE[0],
    }  # of Dense, and where nothing intercepts


class ScaledParam(nn.Einsum):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return 4 * value if name == "kernel" else value


class OnlyWithoutProduct(nn.Dense):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], 256), self.param_dtype)
        return x @ kernel if self.dot_general is None else jnp.zeros((len(x), 256), x.dtype)


class Adapted(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + 2


@pytest.mark.parametrize(
    ("make", "is_fused"),
    [
        (lambda kind=ScaledParam: kind((128, 256), "td,dh->th", use_bias=False, **bf16), False),
        (lambda kind=OnlyWithoutProduct: kind(256, use_bias=False, **bf16), False),
        (lambda kind=Adapted: kind(256, use_bias=False, **bf16), True),
    ],
)
def test_subclasses_with_code_of_their_own(make, is_fused, fused_products):
    x = random_weights((3, 128), scale=1)
    kind = type(make())
    plain = init(make(), x)
    small = df11_jax.compress_params(plain)
    actual = jax.jit(make(compressed(kind, fused=True)).apply)(small, x)
    assert_same_bits(actual, jax.jit(make().apply)(plain, x))
    assert len(fused_products) == is_fused


class Einsums(nn.Module):
    subscripts: str
    shape: tuple[int, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.normal()
        options = bf16 | {"use_bias": self.use_bias, "bias_init": bias}
        return nn.Einsum(self.shape, self.subscripts, **options)(x)


@pytest.mark.parametrize(
    ("subscripts", "shape", "x", "layout", "is_fused"),
    [
        ("btd,dnh->btnh", (128, 2, 64), (2, 3, 128), {"row_axes": {"kernel": 1}}, True),
        ("btd,dnh->bnth", (128, 2, 64), (2, 3, 128), {"row_axes": {"kernel": 1}}, True),
        ("bthn,nhd->btd", (2, 64, 128), (2, 3, 64, 2), {}, True),
        (
            "td,vd -> tv",
            (256, 128),
            (3, 128),
            {"row_axes": {"kernel": 1}, "along_columns": "kernel"},
            True,
        ),
        ("td,vd -> tv", (256, 128), (3, 128), {}, False),  # compressed for another product
        ("btd,dnh->btnh", (128, 2, 64), (2, 3, 128), {}, False),
        ("btd,ndh->btnh", (2, 128, 64), (2, 3, 128), {"batch_axes": {"kernel": 1}}, True),
        ("btd,ndh->btnh", (2, 128, 64), (2, 3, 128), {}, False),
        ("btd,ndh->btnh", (2, 128, 96), (2, 3, 128), {"batch_axes": {"kernel": 1}}, True),
        ("btd,cdnh->cbtnh", (2, 128, 2, 64), (2, 3, 128), {}, False),
        ("bnd,ndh->bnh", (2, 128, 64), (3, 2, 128), {}, False),
        ("...d,dh->...h", (128, 256), (3, 128), {}, False),
        ("td,dh->th", (128, 256), (33, 128), {}, False),  # too many rows
    ],
)
def test_einsum(subscripts, shape, x, layout, is_fused, fused_products):
    module = Einsums(subscripts, shape)
    x = random_weights(x, scale=1)
    plain = init(module, x)
    small = df11_jax.compress_params(plain, min_size=8192, **layout)
    expected = jax.jit(module.apply)(plain, x)
    actual = jax.jit(compressed(Einsums, fused=True)(subscripts, shape).apply)(small, x)
    assert_same_bits(actual, expected)
    assert len(fused_products) == is_fused


@pytest.mark.parametrize(
    ("shape", "kernel", "bias", "x", "error"),
    [
        ((2, 64, 128), (2, 64, 128), (128,), (3, 2, 64), ValueError),  # not [.., 64, 2]
        ((4, 32, 128), (2, 64, 128), (128,), (3, 64, 2), flax.errors.ScopeParamShapeError),
        ((2, 64, 128), (2, 64, 128), (2, 64), (3, 64, 2), flax.errors.ScopeParamShapeError),
    ],
)
def test_einsums_that_do_not_fit(shape, kernel, bias, x, error, fused_products):
    """They have as many elements as if they did, so that a product would not notice."""
    params = {"kernel": random_weights(kernel), "bias": jnp.zeros(bias, jnp.bfloat16)}
    small = {"params": df11_jax.compress_params(params, min_size=8192)}
    x = random_weights(x, scale=1)
    for module in (nn.Einsum, compressed(nn.Einsum, fused=True)):
        with pytest.raises(error):
            module(shape, "thn,nhd->td", **bf16).apply(small, x)


@pytest.mark.parametrize("dtype", [jnp.float32, None])
def test_other_types_are_left_to_flax(dtype, fused_products):
    module = nn.Dense(128, dtype=dtype, param_dtype=jnp.bfloat16)
    x = jnp.ones((2, 128), jnp.float32)
    plain = init(module, x)
    small = df11_jax.compress_params(plain)
    fused = compressed(nn.Dense, fused=True)(128, dtype=dtype, param_dtype=jnp.bfloat16)
    actual, expected = jax.jit(fused.apply)(small, x), jax.jit(module.apply)(plain, x)
    assert actual.dtype == expected.dtype == jnp.float32
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()
    assert not fused_products


@pytest.mark.parametrize("index", [1, np.int32(1), jnp.int32(1)])
def test_a_slice_is_a_parameter(index):
    weights = random_weights((3, 128, 128))
    stack = df11_jax.compress(weights, stack_axes=1)
    x = jnp.ones((2, 128), jnp.bfloat16)
    variables = {"params": {"kernel": df11_jax.DF11Slice(stack, index)}}
    actual = nn.Dense(128, use_bias=False, **bf16).apply(variables, x)
    assert_same_bits(actual, x @ weights[1])


def test_a_product_of_ones_own_stays(fused_products):
    def twice(*args, **options):
        return 2 * jax.lax.dot_general(*args, **options)

    module = nn.Dense(128, dot_general=twice, **bf16)
    x = jnp.ones((2, 128), jnp.bfloat16)
    plain = init(module, x)
    fused = compressed(nn.Dense, fused=True)(128, dot_general=twice, **bf16)
    small = df11_jax.compress_params(plain)
    assert_same_bits(jax.jit(fused.apply)(small, x), jax.jit(module.apply)(plain, x))
    assert not fused_products


@pytest.mark.parametrize("style", ["scan", pytest.param("whole", marks=pytest.mark.slow)])
def test_errors_say_where_a_parameter_is(style):
    model, _, _, small = make(style)
    where = "layers" if style == "scan" else "layers_0"
    layer = small["params"][where]
    kernel = layer["up"]["kernel"]
    layer["up"]["kernel"] = dataclasses.replace(kernel, exponents=kernel.exponents[..., :-1])
    with pytest.raises(ValueError, match=f"^{where}/up/kernel: exponents is"):
        model.apply(small, TOKENS)


@pytest.mark.slow
def test_parameters_that_a_layer_maps_over():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            each = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
            return x + each(128, **bf16)(x), None

    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
    x = jnp.ones((3, 5, 128), jnp.bfloat16)
    plain = init(nn.scan(Experts, **options)(), x, None)
    small = df11_jax.compress_params(plain, stacked=".")
    expected, _ = jax.jit(nn.scan(Experts, **options)().apply)(plain, x, None)
    actual, _ = jax.jit(scan(Experts, **options)().apply)(small, x, None)
    assert_same_bits(actual, expected)
    with pytest.raises(ValueError, match=r"cannot be mapped over: fused=True passes .* Leave it"):
        scan(Experts, fused=True, **options)().apply(small, x, None)


# nnx


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False, **bf16)
        self.split = nnx.Einsum("btd,dnh->btnh", (WIDTH, 2, 64), (2, 64), rngs=rngs, **bf16)
        self.join = nnx.Einsum("btnh,mnh->btm", (WIDTH, 2, 64), rngs=rngs, **bf16)
        self.heads = nnx.Einsum("btd,ndh->btnh", (2, WIDTH, 64), rngs=rngs, **bf16)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs, **bf16)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs, **bf16)

    def __call__(self, x):
        x = x + self.attention(x)
        x = x + self.join(self.split(x) + self.heads(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs, **bf16)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


PRODUCTS = 2 * 9 + 1
run = nnx.jit(lambda network, tokens: network(tokens))


def test_nnx(fused_products):
    network = Network(nnx.Rngs(0))
    expected, before = run(network, TOKENS), nnx.graphdef(network)
    df11_jax.nnx.compress(network, fused=True)
    assert_same_bits(run(network, TOKENS), expected)
    assert len(fused_products) == PRODUCTS
    many = jnp.zeros((1, 33), jnp.int32)
    plain = Network(nnx.Rngs(0))
    assert_same_bits(run(network, many), run(plain, many))
    assert len(fused_products) == PRODUCTS

    for same in (nnx.clone(network), copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        del fused_products[:]
        assert_same_bits(run(same, TOKENS), expected)
        assert len(fused_products) in (0, PRODUCTS)  # nnx.jit may have traced it
        assert isinstance(same.embed, df11_jax.nnx.FusedEmbed)

    del fused_products[:]
    df11_jax.nnx.decompress(network)
    assert nnx.graphdef(network) == before
    assert_same_bits(run(network, TOKENS), expected)
    assert not fused_products


def test_nnx_compressed_twice(fused_products):
    network = Network(nnx.Rngs(0))
    expected = run(network, TOKENS)
    df11_jax.nnx.compress(network)
    df11_jax.nnx.compress(network, fused=True)  # other modules have other matrices
    assert_same_bits(run(network, TOKENS), expected)
    assert 0 < len(fused_products) < PRODUCTS
    df11_jax.nnx.decompress(network)
    df11_jax.nnx.compress(network, fused=True)
    del fused_products[:]
    jax.clear_caches()  # or other tests may have traced it
    df11_jax.nnx.compress(network)
    assert_same_bits(run(network, TOKENS), expected)
    assert len(fused_products) == PRODUCTS


@needs_product
def test_nnx_on_a_gpu():
    network = Network(nnx.Rngs(0))
    df11_jax.nnx.compress(network, fused=True)
    graphdef, state = nnx.split(network)
    call = lambda state, tokens: nnx.merge(graphdef, state)(tokens)  # noqa: E731
    assert count_calls(call, state, TOKENS) == [PRODUCTS, 1]


def test_nnx_layers_of_a_scan(fused_products):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_layers(rngs):
        return nnx.Linear(WIDTH, WIDTH, rngs=rngs, **bf16)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return layer(x)

    layers = make_layers(nnx.Rngs(0).split(LAYERS))
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    expected = scanned(x, layers)
    df11_jax.nnx.compress(layers, stacked=".", fused=True)
    assert_same_bits(scanned(x, layers), expected)
    assert set(fused_products) == {((2, WIDTH), (2, WIDTH))}


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
def test_nnx_layers_in_scan_blocks(lazy, fused_products):
    layers = nnx.vmap(Layer)(nnx.Rngs(0).split(LAYERS))
    graphdef, plain = nnx.split(layers)
    x = jnp.ones((2, 3, WIDTH), jnp.bfloat16)

    @jax.jit
    def run(x, stacked):
        layer = lambda x, layer, _: (nnx.merge(graphdef, layer, copy=True)(x), None)  # noqa: E731
        return df11_jax.scan_blocks(layer, x, stacked, lazy=lazy)[0]

    expected = run(x, plain)
    df11_jax.nnx.compress(layers, stacked=".", fused=True)
    graphdef, small = nnx.split(layers)
    assert_same_bits(run(x, small), expected)
    assert len(fused_products) == (9 if lazy else 0)  # else the layer's weights are no reads


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.LinearGeneral((64, 2), WIDTH, axis=(-2, -1), rngs=rngs, **bf16),
        lambda rngs: nnx.Einsum("thn,hnd->td", (64, 2, WIDTH), rngs=rngs, **bf16),
    ],
)
def test_nnx_rows_that_do_not_fit(make, fused_products):
    model, x = make(nnx.Rngs(0)), jnp.ones((3, 2, 64), jnp.bfloat16)
    df11_jax.nnx.compress(model, fused=True)
    with pytest.raises((TypeError, ValueError), match="64"):
        run(model, x)
    assert run(model, x.swapaxes(1, 2)).shape == (3, WIDTH)
    assert len(fused_products) == 1


def test_nnx_products_of_ones_own_stay(fused_products):
    def twice(*args, **options):
        return 2 * jax.lax.dot_general(*args, **options)

    model = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0), dot_general=twice, **bf16)
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    expected = run(model, x)
    df11_jax.nnx.compress(model, fused=True)
    assert_same_bits(run(model, x), expected)
    assert not fused_products and model.dot_general is twice


class OnlyPlain(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...] if self.dot_general is jax.lax.dot_general else 0 * x


class OnlyPlainHeads(nnx.LinearGeneral):
    def __call__(self, x):
        return super().__call__(x) * (1 if self.dot_general is None else 0)


class OnlyPlainEinsum(nnx.Einsum):
    def __call__(self, x):
        return super().__call__(x) * (1 if self.einsum_op is jnp.einsum else 0)


class NoPytree(nnx.Linear, pytree=False):
    def __call__(self, x):
        return 2 * super().__call__(x)


SUBCLASSES = {
    "lora": (lambda rngs: nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs, **bf16), 1),
    "no pytree": (lambda rngs: NoPytree(WIDTH, WIDTH, rngs=rngs, **bf16), 1),
    "plain": (lambda rngs: OnlyPlain(WIDTH, WIDTH, use_bias=False, rngs=rngs, **bf16), 0),
    "heads": (lambda rngs: OnlyPlainHeads(WIDTH, (2, 64), rngs=rngs, **bf16), 1),
    "einsum": (lambda rngs: OnlyPlainEinsum("td,dh->th", (WIDTH,) * 2, rngs=rngs, **bf16), 1),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_nnx_subclasses_with_code_of_their_own(name, fused_products):
    make, products = SUBCLASSES[name]
    model = make(nnx.Rngs(0))
    kind, before = type(model), nnx.graphdef(model)
    x = random_weights((3, WIDTH), scale=1)
    expected = run(model, x)
    df11_jax.nnx.compress(model, fused=True)
    assert run(model, x).tobytes() == expected.tobytes()
    assert len(fused_products) == products
    for same in (nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(same, kind) and type(same) is type(model)
        assert type(same).__name__ == kind.__name__
        del fused_products[:]
        fresh = nnx.jit(lambda same, x: same(x))
        assert fresh(same, x).tobytes() == expected.tobytes()
        assert len(fused_products) == products
    df11_jax.nnx.decompress(model)
    assert nnx.graphdef(model) == before and type(model) is kind


def test_nnx_subclasses_that_are_registered_by_name():
    """The type that is made of one does not take its place."""
    registered = {}

    class Registered:
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            registered[cls.__name__] = registered[cls.__qualname__] = cls

    class Twice(Registered, nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Twice(WIDTH, WIDTH, rngs=nnx.Rngs(0), **bf16)
    df11_jax.nnx.compress(model, fused=True)
    assert type(model) is not Twice
    assert (type(model).__name__, type(model).__qualname__) == ("Twice", Twice.__qualname__)
    assert registered["Twice"] is registered[Twice.__qualname__] is Twice


# How leaves are compressed as matrices.


def test_matrices_of_a_tree():
    plain = {"q": random_weights((3, 128, 2, 64)), "o": random_weights((3, 2, 64, 128))}
    plain |= {"table": random_weights((256, 128)), "both": random_weights((3, 2, 64, 128))}
    options = {"stacked": "^[qo]|both", "row_axes": {"q": 1, "both": 2, "^b": 1}}
    plain["heads"] = random_weights((2, 128, 64))
    options |= {"batch_axes": {"heads": 1}, "along_columns": "table"}
    small = df11_jax.compress_params(plain, **options)
    names = ("batch_axes", "row_axes", "along_columns")
    layouts = {key: tuple(getattr(a.layout, name) for name in names) for key, a in small.items()}
    assert layouts == {
        "q": (0, 1, False),
        "o": (0, 2, False),
        "both": (0, 2, False),
        "table": (0, 1, True),
        "heads": (1, 1, False),
    }
    jax.tree.map(assert_same_bits, df11_jax.decompress_params(small), plain)


def test_a_tied_leaf_that_is_two_matrices():
    weights = random_weights((128, 2, 64))
    small = df11_jax.compress_params({"a": weights, "b": weights}, row_axes={"a": 1})
    assert (small["a"].layout.row_axes, small["b"].layout.row_axes) == (1, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_axes": {"a": 4}}, ValueError, r"^a: .* \(128, 2, 64\) .* 4 row axes"),
        ({"row_axes": {"a": 1.5}}, TypeError, "float"),
        ({"batch_axes": {"a": 4}}, ValueError, r"^a: .* 4 batch axes"),
        ({"row_axes": {"(": 1}}, ValueError, "row_axes: '\\(' is not a regular expression"),
        ({"row_axes": 1}, TypeError, "row_axes: expected a dict of .*, got 1"),
        ({"along_columns": True}, TypeError, "along_columns: expected a regular expression"),
        ({"row_axes": {"a": 1}, "like": {}}, ValueError, "leave out .* row_axes"),
    ],
)
def test_matrices_that_are_none(options, error, message):
    plain = {"a": random_weights((128, 2, 64))}
    if "like" in options:
        options = options | {"like": df11_jax.compress_params(plain)}
    with pytest.raises(error, match=message):
        df11_jax.compress_params(plain, **options)


def test_patterns_that_are_found_nowhere():
    plain = {"a": random_weights((128, 128))}
    with pytest.warns(UserWarning, match=r"row_axes='query' is found in no path"):
        df11_jax.compress_params(plain, row_axes={"query": 1})
    with pytest.warns(UserWarning, match=r"along_columns='embed' is found in no path"):
        df11_jax.compress_params(plain, along_columns="embed")


# What an array was read from.


def test_nothing_is_kept_of_what_was_read():
    model = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0), **bf16)
    df11_jax.nnx.compress(model)
    weights = model.kernel[...]
    found = _reads.source_of(weights)
    assert found.exponents is model.kernel.get_raw_value().exponents
    assert _reads.source_of(jnp.copy(weights)) is None
    assert _reads.source_of(np.asarray(weights)) is None
    del found
    df11_jax.nnx.decompress(model)
    gc.collect()
    assert _reads.source_of(weights) is None  # the compressed arrays are gone
    del weights
    gc.collect()
    assert not _reads._sources
