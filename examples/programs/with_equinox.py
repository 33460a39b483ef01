# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "equinox==0.13.8", "jax==0.12.0.1"]
# ///
"""Equinox: modules are pytrees, so that a compressed one is called as it is, or block by block."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import df11_jax

WIDTH, LAYERS = 128, 4


class Block(eqx.Module):
    """A layer of two matrices."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=up, dtype=jnp.bfloat16)
        self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, key=down, dtype=jnp.bfloat16)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(x)))


@eqx.filter_jit
def run(block, x):
    return jax.vmap(block)(x)


@eqx.filter_jit
def run_stack(blocks, x):
    """The blocks of a stack in turn: jax.lax.scan, but that compressed ones are decompressed."""
    arrays, static = eqx.partition(blocks, eqx.is_array_like, is_leaf=is_compressed)

    def step(x, arrays, _):
        return jax.vmap(eqx.combine(arrays, static))(x), None

    return df11_jax.scan_blocks(step, x, arrays)[0]


def is_compressed(leaf):
    return isinstance(leaf, df11_jax.DF11Array)


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(*(np.asarray(a).view(np.uint16) for a in (actual, expected)))


def main():
    """One block, and a stack of them, plain and compressed."""
    x = jax.random.normal(jax.random.key(1), (3, WIDTH)).astype(jnp.bfloat16)
    block = Block(jax.random.key(0))
    small = df11_jax.compress_params(block)
    assert is_compressed(small.up.weight)
    assert_same_bits(run(small, x), run(block, x))
    print("a block: the same outputs")

    blocks = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), LAYERS))
    small = df11_jax.compress_params(blocks, stacked="weight")
    assert is_compressed(small.up.weight)
    assert_same_bits(run_stack(small, x), run_stack(blocks, x))
    print("a stack of blocks: the same outputs")


if __name__ == "__main__":
    main()
