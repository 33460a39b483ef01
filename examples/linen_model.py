"""A flax.linen model that generates from compressed weights.

    python examples/linen_model.py

Two lines differ from a model without df11_jax: `scan` is that of df11_jax.linen, and so is the
class that `compressed` makes of nn.Embed.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import df11_jax.linen

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 512, 256, 4, 6, 32

Dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
Norm = functools.partial(nn.RMSNorm, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


class Block(nn.Module):
    """A transformer block that gets one token after the other; keys and values are in "cache"."""

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(
            HEADS, decode=True, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
        )
        x = x + attention(Norm()(x))
        return x + Dense(WIDTH)(nn.gelu(Dense(4 * WIDTH)(Norm()(x)))), None


Embed = df11_jax.linen.compressed(nn.Embed, methods=("__call__", "attend"))


class Model(nn.Module):
    """Embedding, a scan over stacked blocks, and the embedding again as the output layer."""

    @nn.compact
    def __call__(self, tokens):
        embed = Embed(VOCAB, WIDTH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        layers = df11_jax.linen.scan(
            Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(Norm()(x))


model = Model()


@functools.partial(jax.jit, static_argnames="steps")
def generate(params, cache, token, steps):
    """The likeliest tokens after `token`, of each sequence of the batch."""

    def step(carry, _):
        token, cache = carry
        logits, changed = model.apply({"params": params, "cache": cache}, token, mutable="cache")
        token = jnp.argmax(logits, axis=-1)
        return (token, changed["cache"]), token[:, 0]

    return jax.lax.scan(step, (token, cache), None, steps)[1].T


def main():
    """Generates with plain and with compressed weights, and compares."""
    variables = model.init(jax.random.key(0), jnp.zeros((2, LENGTH), jnp.int32))
    params, cache = variables["params"], variables["cache"]
    small = df11_jax.compress_params(params, stacked="^layers/")
    print(df11_jax.size_report(small))

    token = jnp.array([[1], [2]])
    tokens = generate(small, cache, token, steps=LENGTH)
    np.testing.assert_array_equal(tokens, generate(params, cache, token, steps=LENGTH))
    print("the same tokens from plain and from compressed weights:", *np.asarray(tokens), sep="\n")


if __name__ == "__main__":
    main()
