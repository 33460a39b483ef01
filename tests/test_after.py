"""`after`: in a loop, weights are decompressed again rather than in advance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from payloads import assert_same_bits, count_decodes, random_weights

from df11_jax import after, compress, decompress

LAYERS, WIDTH, STEPS = 4, 128, 3

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes, or reads programs, of the CPU backend"
)


@pytest.fixture(scope="module")
def params():
    return [compress(random_weights((WIDTH, WIDTH), i)) for i in range(LAYERS)]


@pytest.fixture(scope="module")
def x():
    return random_weights((2, WIDTH), scale=1.0)


def run_layers(params, x):
    for layer in after(params, x):
        x = jnp.tanh(x @ decompress(layer))
    return x


def loop(params, x):
    return jax.lax.fori_loop(0, STEPS, lambda _, x: run_layers(params, x), x)


@on_cpu
def test_decodes_in_every_step(params, x):
    assert count_decodes(jax.jit(loop), params, x) == STEPS * LAYERS


@on_cpu
def test_without_compiled_decoders(params, x, monkeypatch):
    monkeypatch.setattr("df11_jax._ffi.platforms", lambda target: ())

    # A new function: jit knows the others with this platform.
    program = jax.jit(lambda *args: loop(*args)).lower(params[:2], x).compile().as_text()
    # The decoder has loops of its own, which are inside of this one.
    assert program[program.index("\nENTRY") :].count(" while(") == 1


def test_derivatives(params, x):
    def loss(x, run):
        return jnp.sum(run(params, x).astype(jnp.float32))

    def without(params, x):
        for layer in params:
            x = jnp.tanh(x @ decompress(layer))
        return x

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_same_bits(gradient(x, run_layers), gradient(x, without))
    assert_same_bits(gradient(x, jax.checkpoint(run_layers)), gradient(x, without))


def test_other_leaves_stay(params, x):
    tree = {"compressed": params[0], "plain": x, "name": "a", "none": None}
    tied = after(tree, (x, jax.random.key(0), "text", None))
    assert tied["plain"] is x
    assert tied["name"] == "a"
    jax.tree.map(np.testing.assert_array_equal, tied["compressed"], params[0])
    for inputs in (None, "text", []):
        assert after(tree, inputs)["compressed"].header is params[0].header
    assert after({}, x) == {}
