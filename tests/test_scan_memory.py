"""`scan_blocks`: when blocks are decoded, and what is in memory."""

import jax
import jax.numpy as jnp
import pytest
from payloads import assert_same_bits, count_decodes
from scanned_blocks import (
    BLOCK_BYTES,
    HIDDEN,
    LAYERS,
    TENSORS,
    WIDTH,
    X,
    block,
    check_decodes_in_loop,
    forward,
    loss,
    make_params,
    on_cpu,
    temp_bytes,
)

from df11_jax import scan_blocks


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def one_layer():
    return make_params(1)


@pytest.fixture(scope="module")
def x():
    return X


def generate(params, x, tokens=5):
    return jax.lax.fori_loop(0, tokens, lambda _, x: jnp.tanh(forward(params, x)[0]), x)


@on_cpu
def test_decodes_each_block_once(params, x):
    _, compressed = params
    assert count_decodes(jax.jit(forward), compressed, x) == LAYERS * TENSORS


@on_cpu
def test_decodes_each_block_once_a_token(params, x):
    plain, compressed = params
    assert count_decodes(jax.jit(generate), compressed, x) == 5 * LAYERS * TENSORS
    assert_same_bits(jax.jit(generate)(compressed, x), jax.jit(generate)(plain, x))


@on_cpu
def test_one_layer_in_a_token_loop_is_not_decoded_in_advance(one_layer, x):
    # XLA unrolls the inner loop, so that nothing but the carry ties the decode to the outer one.
    plain, compressed = one_layer
    assert count_decodes(jax.jit(generate), compressed, x) == 5 * TENSORS
    assert_same_bits(jax.jit(generate)(compressed, x), jax.jit(generate)(plain, x))
    check_decodes_in_loop(jax.jit(generate).lower(compressed, x).compile().as_text())


@on_cpu
def test_a_constant_in_the_carry_does_not_untie_decodes(one_layer, x):
    def with_constant(carry, p, _):
        positions, x = carry
        x, _ = block(x + positions, p, None)
        return (positions, x), None

    def run(params, positions, x):
        def token(_, x):
            return scan_blocks(with_constant, (positions, x), params)[0][1]

        return jax.lax.fori_loop(0, 5, token, x)

    _, compressed = one_layer
    assert count_decodes(jax.jit(run), compressed, jnp.ones_like(x), x) == 5 * TENSORS


@on_cpu
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the CPU backend makes float32 copies of all operands"
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_memory_is_one_block(params, x, tokens):
    def product(x, w):  # the CPU backend makes float32 copies of what `@` multiplies
        return jnp.sum(x[:, None] * w, axis=0, dtype=jnp.float32).astype(x.dtype)

    def block(x, p, _):
        hidden = jnp.tanh(product(x * p["scale"], p["mlp"]["up"]))
        return x + product(hidden, p["mlp"]["down"]), None

    def run(p, x):
        return jax.lax.fori_loop(0, tokens, lambda _, x: scan_blocks(block, x, p)[0], x)

    _, compressed = params
    activations = 4 * (WIDTH + HIDDEN)
    assert temp_bytes(run, compressed, x) <= 1.15 * BLOCK_BYTES + activations


@on_cpu
def test_memory_of_the_backward_pass_is_one_block(params, x):
    _, compressed = params
    float32_copies = 2 * 4 * WIDTH * HIDDEN  # of both weights, as above
    activations = LAYERS * 8 * (WIDTH + HIDDEN)
    gradient = jax.grad(lambda x, p: loss(x, p))
    assert temp_bytes(gradient, x, compressed) <= 1.15 * BLOCK_BYTES + float32_copies + activations


@on_cpu
def test_program_neither_slices_nor_copies_payloads(params, x):
    _, compressed = params
    for function in (forward, generate):
        check_decodes_in_loop(jax.jit(function).lower(compressed, x).compile().as_text())
