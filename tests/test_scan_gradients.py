"""Derivatives through `scan_blocks`: the same bits, and weights decoded again, not stored."""

import functools

import jax
import jax.numpy as jnp
import pytest
from mostly_slow import mostly_slow
from payloads import assert_same_bits, count_decodes, random_weights, stored_sizes
from scanned_blocks import (
    HIDDEN,
    LAYERS,
    TENSORS,
    WIDTH,
    X,
    block,
    forward,
    loss,
    make_params,
    on_cpu,
)


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def x():
    return X


def with_more_on_weights(x, params, _):
    """A block that makes other arrays of the weights, which are as large."""
    mlp = {
        name: jax.jit(lambda w: w.T.astype(jnp.float32).reshape(4, -1))(w)
        for name, w in params["mlp"].items()
    }
    mlp = {name: jnp.tanh(w).reshape(params["mlp"][name].shape[::-1]).T for name, w in mlp.items()}
    return block(x, params | {"mlp": mlp}, None)


def half_checkpointed(x, params, _):
    x = jnp.tanh(x)
    return jax.checkpoint(lambda x, p: block(x, p, None))(x, params)


BLOCKS = {
    "plain": block,
    "casts": with_more_on_weights,
    "checkpoint": jax.checkpoint(block),
    "part in checkpoint": half_checkpointed,
    "policy": jax.checkpoint(block, policy=jax.checkpoint_policies.everything_saveable),
}


@pytest.mark.parametrize("block_fn", mostly_slow(BLOCKS.values()), ids=BLOCKS)
def test_gradients_are_the_same_bits(params, x, block_fn):
    plain, compressed = params
    gradient = jax.jit(jax.grad(lambda x, p: loss(x, p, block_fn)))
    assert_same_bits(gradient(x, compressed), gradient(x, plain))


@pytest.mark.parametrize("block_fn", BLOCKS.values(), ids=BLOCKS)
@on_cpu
def test_weights_are_decoded_again_and_not_stored(params, x, block_fn):
    _, compressed = params
    gradient = jax.jit(jax.grad(lambda x: loss(x, compressed, block_fn)))
    assert count_decodes(gradient, x) == 2 * LAYERS * TENSORS
    stored = stored_sizes(lambda x: loss(x, compressed, block_fn), x)
    assert all(size < WIDTH * HIDDEN for size in stored)


def test_gradients_of_gradients_store_no_weights(params, x):
    plain, compressed = params

    def gradient(x, p, block):
        return jax.grad(lambda x: loss(x, p, block))(x)

    @functools.partial(jax.jit, static_argnums=2)
    def penalty(x, p, block):
        return jax.grad(lambda x: jnp.sum(gradient(x, p, block).astype(jnp.float32) ** 2))(x)

    run_again = jax.checkpoint(jax.checkpoint(block))
    assert_same_bits(penalty(x, compressed, block), penalty(x, plain, run_again))
    stored = stored_sizes(lambda x: gradient(x, compressed, block), x)
    assert all(size < WIDTH * HIDDEN for size in stored)


def test_gradients_of_plain_leaves(params, x):
    plain, compressed = params

    def with_scale(scale, p):
        return loss(x, p | {"scale": scale})

    gradient = jax.jit(jax.grad(with_scale))
    assert_same_bits(gradient(plain["scale"], compressed), gradient(plain["scale"], plain))


def test_gradients_of_what_the_block_closes_over(params, x):
    def with_adapter(adapter, p):
        a, b = adapter
        return loss(x, p, lambda x, p, _: block(x + (x @ a) @ b, p, None))

    plain, compressed = params
    adapter = random_weights((WIDTH, 4), 6, 0.1), random_weights((4, WIDTH), 7, 0.1)
    gradient = jax.jit(jax.grad(with_adapter))
    for actual, expected in zip(
        gradient(adapter, compressed), gradient(adapter, plain), strict=True
    ):
        assert_same_bits(actual, expected)


def test_forward_mode(params, x):
    plain, compressed = params
    run = jax.jit(lambda p: jax.jvp(lambda x: forward(p, x)[0], (x,), (jnp.ones_like(x),))[1])
    assert_same_bits(run(compressed), run(plain))
    second = jax.jit(lambda p: jax.jvp(jax.grad(lambda x: loss(x, p)), (x,), (x,))[1])
    assert_same_bits(second(compressed), second(plain))


def test_nothing_is_added_without_derivatives(params, x):
    _, compressed = params
    text = jax.jit(forward).lower(compressed, x).as_text()
    assert text.count("optimization_barrier") == 1
    assert text.count("custom_call @df11_decode") <= 1
