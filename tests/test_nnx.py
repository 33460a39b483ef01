"""NNX models compressed in place: the same bits, whatever is done with the model."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from mostly_slow import mostly_slow
from payloads import assert_same_bits, bits, count_decodes, random_weights, stored_sizes

import df11_jax
from df11_jax import after
from df11_jax.nnx import CompressedParam, compress

LAYERS, WIDTH, VOCAB = 3, 128, 256
TENSORS = 6  # compressed, of a block: query, key, value, out, up, down

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes of the CPU backend"
)
bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs, **bf16)
        self.attention = nnx.MultiHeadAttention(
            2, WIDTH, use_bias=False, decode=False, rngs=rngs, **bf16
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs, **bf16)
        self.down = nnx.LinearGeneral(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs, **bf16)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs, **bf16)
        self.make_layers(rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.run_layers(self.embed(tokens)))


class Unrolled(Model):
    def make_layers(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(Model):
    def make_layers(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)

    def run_layers(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


class InScanBlocks(Scanned):
    def run_layers(self, x):
        graphdef, stacked = nnx.split(self.layers)

        def run(x, layer, _):
            return nnx.merge(graphdef, layer, copy=True)(x), None

        return df11_jax.scan_blocks(run, x, stacked)[0]


models = pytest.mark.parametrize("model_type", mostly_slow([Scanned, Unrolled, InScanBlocks]))


@pytest.fixture(scope="module")
def tokens():
    return jnp.arange(1, 13).reshape(2, 6)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def make(model_type):
    """A model, compressed, and the logits that it had before."""
    model = model_type(nnx.Rngs(0))
    logits = forward(model, jnp.arange(1, 13).reshape(2, 6))
    compress(model, stacked=None if model_type is Unrolled else "^layers/")
    return model, logits


def compressed_params(model):
    return jax.tree.leaves(
        nnx.state(model, CompressedParam), is_leaf=lambda x: isinstance(x, CompressedParam)
    )


# What is computed.


@models
def test_same_bits(model_type, tokens):
    model, expected = make(model_type)
    report = df11_jax.size_report(nnx.state(model))
    assert report.nbytes < 0.68 * report.nbytes_before
    assert_same_bits(forward(model, tokens), expected)
    assert_same_bits(jax.jit(lambda model, tokens: model(tokens))(model, tokens), expected)
    eager = model(tokens)
    nnx.update(model, df11_jax.decompress_params(nnx.state(model)))
    assert_same_bits(forward(model, tokens), expected)  # plain arrays in `CompressedParam`s
    assert_same_bits(eager, model(tokens))


class Weights(nnx.Param):
    """A type of the user's own."""


@models
def test_there_and_back(model_type, tokens):
    model = model_type(nnx.Rngs(0))
    model.own = Weights(random_weights((256, 128)))
    model.tied = nnx.Param(model.own.get_raw_value())
    before = nnx.state(model)
    types = {path: type(leaf) for path, leaf in nnx.to_flat_state(before)}
    compress(model, stacked=None if model_type is Unrolled else "^layers/")
    assert type(model.own) not in types.values() and compressed_params(model)
    df11_jax.nnx.decompress(model)
    after_ = dict(nnx.to_flat_state(nnx.state(model)))
    assert {path: type(leaf) for path, leaf in after_.items()} == types
    for path, leaf in nnx.to_flat_state(before):
        assert_same_bits(leaf.get_raw_value(), after_[path].get_raw_value())
    assert model.own.get_raw_value() is model.tied.get_raw_value()
    df11_jax.nnx.decompress(model)  # of what is plain, nothing


@models
def test_copies(model_type, tokens):
    model, expected = make(model_type)
    graphdef, state = nnx.split(model)
    for other in (
        nnx.merge(graphdef, state),
        nnx.merge(*pickle.loads(pickle.dumps((graphdef, state)))),
        nnx.clone(model),
        copy.deepcopy(model),
        jax.tree.map(jnp.copy, model),
    ):
        assert_same_bits(forward(other, tokens), expected)
        assert hash(nnx.graphdef(other)) == hash(graphdef)
        assert nnx.graphdef(other) == graphdef


class OfMyOwn(nnx.Param):
    pass


def test_parameters_of_a_type_of_ones_own_are_pickled():
    model = nnx.Linear(128, 128, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    model.kernel = OfMyOwn(model.kernel[...])
    plain = model.kernel[...]
    compress(model)
    again = pickle.loads(pickle.dumps(model))
    assert type(again.kernel) is type(model.kernel)
    assert isinstance(again.kernel, OfMyOwn) and isinstance(again.kernel, CompressedParam)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    assert_same_bits(again.kernel[...], plain)


def test_the_state_of_another_model(tokens):
    model, expected = make(Unrolled)
    other = Unrolled(nnx.Rngs(1))
    compress(other)
    nnx.update(other, nnx.state(model))
    assert_same_bits(forward(other, tokens), expected)
    params, rest = nnx.state(model, CompressedParam, ...)
    assert_same_bits(forward(nnx.merge(nnx.graphdef(model), params, rest), tokens), expected)


def test_a_checkpoint(tokens, tmp_path):
    model, expected = make(Unrolled)
    graphdef, state = nnx.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        )
    assert_same_bits(forward(nnx.merge(graphdef, restored), tokens), expected)


def test_an_abstract_model(tokens):
    model, _ = make(Scanned)
    graphdef, state = nnx.split(model)
    abstract = nnx.merge(graphdef, jax.eval_shape(lambda: state))
    assert "DF11Array(bfloat16[3,128,512], 10.5" in repr(abstract)
    assert abstract.layers.up.kernel.shape == (LAYERS, WIDTH, 4 * WIDTH)
    assert jax.eval_shape(lambda model: model(tokens), abstract).shape == (2, 6, VOCAB)


@pytest.mark.slow
def test_vmap_over_models(tokens):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return Block(rngs)

    x = random_weights((2, 3, 5, WIDTH), 1, 1.0)
    models = make(nnx.Rngs(0))
    run = nnx.jit(nnx.vmap(lambda model, x: model(x)))
    expected = run(models, x)
    compress(models, stacked=".")
    assert_same_bits(run(models, x), expected)


def test_a_cache_in_the_model():
    attention = nnx.MultiHeadAttention(
        2, WIDTH, decode=True, use_bias=False, rngs=nnx.Rngs(0), **bf16
    )
    xs = random_weights((4, 1, 1, WIDTH), 1, 1.0)

    @nnx.jit
    def run(attention):
        attention.init_cache((1, 4, WIDTH), dtype=jnp.bfloat16)
        graphdef, params, rest = nnx.split(attention, nnx.Param, ...)

        def step(rest, x):
            model = nnx.merge(graphdef, after(params, x), rest, copy=True)
            y = model(x)
            return nnx.state(model, nnx.Not(nnx.Param)), y

        return jax.lax.scan(step, rest, xs)[1]

    expected = run(attention)
    compress(attention)
    assert len(compressed_params(attention)) == 4
    assert_same_bits(run(attention), expected)


# Derivatives.


class Adapted(nnx.Module):
    def __init__(self, model):
        self.model = model
        self.adapter = nnx.LoRA(WIDTH, 4, WIDTH, rngs=nnx.Rngs(1), **bf16)
        b = self.adapter.lora_b
        b[...] = random_weights(b.shape, 2)

    def __call__(self, tokens):
        x = self.model.embed(tokens)
        return self.model.embed.attend(self.model.run_layers(x + self.adapter(x)))


def loss(model, tokens):
    return jnp.sum(jnp.square(model(tokens).astype(jnp.float32)))


@models
def test_gradients_are_the_same_bits(model_type, tokens):
    gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    expected = gradient(Adapted(model_type(nnx.Rngs(0))), tokens)
    actual = gradient(Adapted(make(model_type)[0]), tokens)
    assert len(jax.tree.leaves(actual)) == 2
    jax.tree.map(assert_same_bits, actual, expected)


@pytest.mark.slow
def test_an_optimizer_of_what_is_not_compressed(tokens):
    model, _ = make(Scanned)
    trained = nnx.All(nnx.Param, nnx.Not(CompressedParam))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=trained)
    before = bits(model.layers.norm.scale[...]).copy()
    frozen = jax.tree.leaves(nnx.state(model, CompressedParam))

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(
            model, tokens
        )
        optimizer.update(model, gradients)
        return value

    step(model, optimizer)
    assert (bits(model.layers.norm.scale[...]) != before).any()
    for leaf, same in zip(jax.tree.leaves(nnx.state(model, CompressedParam)), frozen, strict=True):
        np.testing.assert_array_equal(leaf, same)


@pytest.mark.parametrize("model_type", [Scanned, InScanBlocks])
def test_weights_are_not_stored_for_the_backward_pass(model_type):
    model, _ = make(model_type)
    graphdef, state = nnx.split(model)

    def run(x):
        return nnx.merge(graphdef, state, copy=True).run_layers(x)

    stored = stored_sizes(run, jnp.zeros((2, 6, WIDTH), jnp.bfloat16))
    assert all(size < WIDTH * WIDTH for size in stored)


# When weights are decoded.


def generate(graphdef, state, tokens, steps, wait):
    def step(_, tokens):
        ready = after(state, tokens) if wait else state
        logits = nnx.merge(graphdef, ready, copy=True)(tokens)
        return jnp.append(tokens[:, 1:], jnp.argmax(logits[:, -1:], axis=-1), axis=1)

    return jax.lax.fori_loop(0, steps, step, tokens)


@on_cpu
@models
def test_decodes_once_a_token(model_type, tokens):
    run = jax.jit(generate, static_argnums=(0, 3, 4))
    expected = run(*nnx.split(model_type(nnx.Rngs(0))), tokens, 5, False)
    model, _ = make(model_type)
    arguments = (*nnx.split(model), tokens)
    all_tensors = LAYERS * TENSORS + 1
    assert count_decodes(run, *arguments, 5, True) == 5 * all_tensors
    np.testing.assert_array_equal(run(*arguments, 5, True), expected)
    # XLA's CPU backend takes decodes whose operands do not change out of the loop.
    hoisted = all_tensors if model_type is Unrolled else 1 + 5 * LAYERS * TENSORS
    assert count_decodes(run, *arguments, 5, False) == hoisted


@on_cpu
def test_after_in_place_in_an_nnx_loop(tokens):
    model, _ = make(Unrolled)

    @nnx.jit
    def run(model, tokens):
        def step(_, carry):
            model, tokens = carry
            nnx.update(model, after(nnx.state(model, CompressedParam), tokens))
            logits = model(tokens)
            return model, jnp.append(tokens[:, 1:], jnp.argmax(logits[:, -1:], axis=-1), axis=1)

        return nnx.fori_loop(0, 5, step, (model, tokens))[1]

    assert count_decodes(run, model, tokens) == 5 * (LAYERS * TENSORS + 1)
    expected = generate(*nnx.split(model), tokens, 5, True)
    np.testing.assert_array_equal(run(model, tokens), expected)


# Errors.


def test_layers_one_by_one_have_arrays_of_equal_shapes(tokens):
    model = Unrolled(nnx.Rngs(0))
    kernel = model.layers[1].up.kernel
    kernel.set_value(kernel.get_value().at[:64].set(1))  # has shorter exponents
    before = forward(model, tokens)
    compress(model)
    leaves = [layer.up.kernel.get_raw_value() for layer in model.layers]
    alone = [df11_jax.compress(df11_jax.decompress(leaf)).exponents.size for leaf in leaves]
    assert alone[1] < max(alone)
    assert {leaf.exponents.size for leaf in leaves} == {max(alone)}
    assert_same_bits(forward(model, tokens), before)


def test_layers_that_are_not_stacked(tokens):
    model = Scanned(nnx.Rngs(0))
    compress(model)
    with pytest.raises(ValueError, match="different leading axis sizes"):
        forward(model, tokens)
    model = InScanBlocks(nnx.Rngs(0))
    compress(model)
    with pytest.raises(ValueError, match=r"attention/key/kernel.*exactly one stack axis"):
        forward(model, tokens)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(1e-3), optax.sgd(1e-3, momentum=0.9), optax.adam(1e-3, mu_dtype=jnp.float32)],
)
@pytest.mark.parametrize("model_type", [Unrolled, Scanned])
def test_an_optimizer_of_compressed_parameters(model_type, optimizer):
    model, _ = make(model_type)
    with pytest.raises(TypeError, match=r"are frozen.*nnx\.LoRAParam.*CompressedParam"):
        nnx.Optimizer(model, optimizer, wrt=nnx.Param)


def test_gradients_of_compressed_parameters(tokens):
    model, _ = make(Unrolled)
    with pytest.raises(TypeError, match="uint32"):
        nnx.grad(loss)(model, tokens)


@pytest.mark.parametrize("model", [{"w": jnp.zeros((256, 256), jnp.bfloat16)}, "model", None])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"expected an nnx.Module.*df11_jax\.compress_params"):
        compress(model)


def test_a_module_without_parameters():
    compress(nnx.Dropout(0.5))
