"""Products of linen modules that multiply without decompressing."""

import dataclasses

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_programs import count_calls, needs_product
from linen_models import LAYERS, SCAN, TENSORS, TOKENS, WIDTH, Compact, Stack, bf16, init
from mostly_slow import mostly_slow
from payloads import assert_same_bits, random_weights

import df11_jax
import df11_jax.linen
import df11_jax.nnx
from df11_jax import _product
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


def twice(next_method, args, kwargs, context):
    y = next_method(*args, **kwargs)
    return 2 * y if context.method_name in ("__call__", "attend") else y


class Intercepted(nn.Module):
    """A module that has its own interceptor of calls of others."""

    @nn.compact
    def __call__(self, tokens, _=None):
        embed = nn.Embed(1024, 128, name="embed", **bf16)
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
    # Of Dense, and where nothing intercepts.
    assert {y[-1] for _, y in fused_products} == {128, 1024}


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
