"""Products of nnx modules that multiply without decompressing."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from gpu_programs import count_calls, needs_product
from linen_models import LAYERS, TOKENS, WIDTH, bf16
from payloads import assert_same_bits, random_weights

import df11_jax
import df11_jax.linen
import df11_jax.nnx


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
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_layers(rngs):
        return nnx.Linear(WIDTH, WIDTH, rngs=rngs, **bf16)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return layer(x)

    layers = make_layers(nnx.Rngs(0))
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    expected = scanned(x, layers)
    df11_jax.nnx.compress(layers, stacked=".", fused=True)
    assert_same_bits(scanned(x, layers), expected)
    assert set(fused_products) == {((2, WIDTH), (2, WIDTH))}


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
def test_nnx_layers_in_scan_blocks(lazy, fused_products):
    layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Layer))(nnx.Rngs(0))
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
