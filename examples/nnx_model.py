"""A flax.nnx model that generates from compressed weights.

    python examples/nnx_model.py

Two lines differ from a model without df11_jax: `compress(model)`, and `after` in the token loop,
without which XLA may decompress all weights in advance and keep them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import df11_jax.nnx

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 512, 256, 4, 6, 32

bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
Linear = functools.partial(nnx.Linear, use_bias=False, **bf16)


class Block(nnx.Module):
    """A transformer block that gets one token after the other, and caches keys and values."""

    def __init__(self, rngs):
        self.norm, self.mlp_norm = (nnx.RMSNorm(WIDTH, rngs=rngs, **bf16) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, use_bias=False, decode=True, rngs=rngs, **bf16
        )
        self.up = Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Model(nnx.Module):
    """Embedding, a list of blocks, and the embedding again as the output layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs, **bf16)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs, **bf16)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


@nnx.jit
def generate(model, token):
    """The likeliest tokens after `token`, of each sequence of the batch."""
    for layer in model.layers:
        layer.attention.init_cache((len(token), LENGTH, WIDTH), dtype=jnp.bfloat16)
    graphdef, params, cache = nnx.split(model, nnx.Param, ...)

    def step(carry, _):
        token, cache = carry
        ready = df11_jax.after(params, token)
        model = nnx.merge(graphdef, ready, cache, copy=True)
        token = jnp.argmax(model(token), axis=-1)
        return (token, nnx.state(model, nnx.Not(nnx.Param))), token[:, 0]

    return jax.lax.scan(step, (token, cache), None, LENGTH)[1].T


def main():
    """Generates with plain and with compressed weights, and compares."""
    model = Model(nnx.Rngs(0))
    token = jnp.array([[1], [2]])
    expected = generate(model, token)

    df11_jax.nnx.compress(model)
    report = df11_jax.size_report(nnx.state(model, nnx.Param))
    print(f"{report.nbytes_before:,} bytes of weights take {report.nbytes:,}")
    tokens = generate(model, token)
    np.testing.assert_array_equal(tokens, expected)
    print("the same tokens from plain and from compressed weights:", *np.asarray(tokens), sep="\n")


if __name__ == "__main__":
    main()
