"""Linen models from compressed parameters: when they are decoded, and what is in memory."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_models import (
    BLOCK_BYTES,
    LAYERS,
    SCAN,
    TENSORS,
    TOKENS,
    VOCAB,
    WIDTH,
    Compact,
    Stack,
    bf16,
    generate,
    init,
    layers,
    loss,
    make,
    tied,
)
from mostly_slow import mostly_slow
from payloads import assert_same_bits, count_decodes, stored_sizes
from scanned_blocks import check_decodes_in_loop

from df11_jax import after, compress_params
from df11_jax.linen import compressed, scan

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes, or reads programs, of the CPU backend"
)


@pytest.fixture
def tokens():
    return TOKENS


# Derivatives.


@pytest.mark.parametrize("kind", mostly_slow(["scan", "nn.scan"]))
def test_gradients_are_the_same_bits_and_weights_are_decoded_again(kind):
    model, _, plain, variables = make(kind)
    run_again = Stack(nn.scan(nn.remat(Compact, static_argnums=(3,)), **SCAN))
    x = jax.random.normal(jax.random.key(1), (2, 6, WIDTH), jnp.bfloat16)
    gradient = jax.jit(jax.grad(loss, argnums=2), static_argnums=0)
    assert_same_bits(gradient(model, variables, x), gradient(run_again, plain, x))
    if jax.default_backend() == "cpu":
        assert count_decodes(gradient, model, variables, x) == 2 * LAYERS * TENSORS

    def once(x):
        return loss(model, variables, x)

    for function in (once, jax.grad(once)):
        assert all(size < WIDTH * WIDTH for size in stored_sizes(function, x))


@pytest.mark.slow
def test_gradients_of_plain_parameters_beside_compressed_ones(tokens):
    model, _, plain, variables = make("scan")
    run_again = Stack(nn.scan(nn.remat(Compact, static_argnums=(3,)), **SCAN))

    def loss(scale, model, variables):
        layers = variables["params"]["layers"] | {"norm": {"scale": scale}}
        variables = {"params": variables["params"] | {"layers": layers}}
        return jnp.sum(model.apply(variables, tokens).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    scale = plain["params"]["layers"]["norm"]["scale"]
    assert_same_bits(gradient(scale, model, variables), gradient(scale, run_again, plain))


# When blocks are decoded, and what is in memory.


@on_cpu
@tied
def test_decodes_each_layer_once_a_token(kind, tokens):
    model, _, _, variables = make(kind)
    run = jax.jit(generate, static_argnums=(0, 3))
    for steps in (1, 5):
        # Embedding and logits decode the same table: XLA makes one decode of these in jax 0.10.2,
        # but not in 0.12.0.
        decodes = count_decodes(run, model, variables, tokens, steps) / steps
        assert decodes - LAYERS * TENSORS in (1, 2)


@on_cpu
def test_one_layer_in_a_token_loop_is_not_decoded_in_advance():
    # XLA unrolls a scan of length one.
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    layer = compress_params(init(Matrices(), x))
    stacked = jax.tree.map(lambda leaf: leaf[None], layer)
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 1}

    def run(model, variables, x, *args):
        return jax.lax.fori_loop(0, 5, lambda _, x: model.apply(variables, x, *args)[0], x)

    for model, variables in (
        (compressed(Matrices)(), layer),
        (scan(Matrices, **options)(), stacked),
        (nn.scan(compressed(Matrices), **options)(), stacked),
    ):
        function = jax.jit(lambda v, x, model=model: run(model, v, x, None))
        assert count_decodes(function, variables, x) == 5 * 2


class Matrices(nn.Module):
    """Two matrices, nothing else."""

    @nn.compact
    def __call__(self, x, _=None):
        hidden = nn.gelu(nn.Dense(4 * WIDTH, name="up", use_bias=False, **bf16)(x))
        return x + nn.Dense(WIDTH, name="down", use_bias=False, **bf16)(hidden), None


@pytest.mark.slow
@on_cpu
def test_after_keeps_decodes_of_unwrapped_modules_in_the_loop(tokens):
    model, plain_model, plain, variables = make("unwrapped unrolled")

    def run(variables, wait):
        def step(_, tokens):
            ready = after(variables, tokens) if wait else variables
            return generate(model, ready, tokens, 1)

        return jax.lax.fori_loop(0, 5, step, tokens)

    run = jax.jit(run, static_argnums=1)
    tensors = LAYERS * TENSORS + 1
    assert count_decodes(run, variables, False) == tensors
    assert count_decodes(run, variables, True) == 5 * tensors
    np.testing.assert_array_equal(run(variables, True), generate(plain_model, plain, tokens, 5))


@on_cpu
def test_stacks_reach_the_decoder_untouched():
    model, _, _, variables = make("scan")
    x = jnp.ones((2, 6, WIDTH), jnp.bfloat16)

    def loop(model, variables, x):
        return jax.lax.fori_loop(0, 5, lambda _, x: layers(model, variables, x), x)

    for function in (layers, loop):
        program = jax.jit(function, static_argnums=0).lower(model, variables, x).compile()
        check_decodes_in_loop(program.as_text())


@on_cpu
@tied
def test_memory_is_one_block(kind, tokens):
    model, _, _, variables = make(kind)
    memory = jax.jit(generate, static_argnums=0).lower(model, variables, tokens).compile()
    temporary = memory.memory_analysis().temp_size_in_bytes
    # The CPU backend makes float32 copies of the bfloat16 operands of products.
    dense = max(3 * BLOCK_BYTES, 3 * 2 * VOCAB * WIDTH)
    assert temporary <= dense + 2**18, temporary / BLOCK_BYTES


# Errors when it runs.


@on_cpu
@tied
def test_corruption_names_the_leaf(kind, tokens):
    model, _, _, variables = make(kind)
    layer = "layers_2" if kind == "unrolled" else "layers"
    kernel = variables["params"][layer]["up"]["kernel"]
    bad = kernel.sign_mantissa.at[..., 7].add(1)
    corrupt = dataclasses.replace(kernel, sign_mantissa=bad)
    params = variables["params"] | {layer: variables["params"][layer] | {"up": {"kernel": corrupt}}}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{layer}/up/kernel.* is corrupt"):
        jax.block_until_ready(jax.jit(model.apply)({"params": params}, tokens))
