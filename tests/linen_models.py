"""Linen models, plain and for compressed parameters, for several tests."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mostly_slow import mostly_slow

from df11_jax import compress_params
from df11_jax.linen import compressed, scan

LAYERS, WIDTH, HEADS, VOCAB = 4, 128, 2, 256
TENSORS = 6  # compressed, of a block: query, key, value, out, up, down
BLOCK_BYTES = 2 * (4 + 8) * WIDTH * WIDTH
TOKENS = jnp.arange(1, 13).reshape(2, 6)

bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


class Compact(nn.Module):
    """A block in the compact style; also records a norm, and drops out."""

    @nn.compact
    def __call__(self, x, positions=None, deterministic=True):
        y = nn.RMSNorm(name="norm", **bf16)(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention", use_bias=False, **bf16)(y)
        hidden = nn.gelu(nn.Dense(4 * WIDTH, name="up", use_bias=False, **bf16)(x))
        hidden = nn.Dropout(0.5)(hidden, deterministic=deterministic)
        x = x + nn.DenseGeneral(WIDTH, axis=-1, name="down", use_bias=False, **bf16)(hidden)
        self.sow("intermediates", "largest", jnp.max(x))
        return x, None


class Setup(nn.Module):
    """The same in the setup style."""

    def setup(self):
        self.norm = nn.RMSNorm(**bf16)
        self.attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, **bf16)
        self.up = nn.Dense(4 * WIDTH, use_bias=False, **bf16)
        self.down = nn.DenseGeneral(WIDTH, axis=-1, use_bias=False, **bf16)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x, positions=None, deterministic=True):
        x = x + self.attention(self.norm(x))
        hidden = self.dropout(nn.gelu(self.up(x)), deterministic=deterministic)
        x = x + self.down(hidden)
        self.sow("intermediates", "largest", jnp.max(x))
        return x, None


SCAN = {
    "variable_axes": {"params": 0, "intermediates": 0},
    "split_rngs": {"params": True, "dropout": True},
    "in_axes": (nn.broadcast, nn.broadcast),
    "length": LAYERS,
}
embedding_methods = ("__call__", "attend")


class Stack(nn.Module):
    """A language model; `stack` makes its layers, or is the class of each."""

    stack: type[nn.Module]
    unrolled: bool = False
    embed: type[nn.Module] = nn.Embed

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        embed = self.embed(VOCAB, WIDTH, name="embed", **bf16)
        x = embed(tokens)
        if self.unrolled:
            for i in range(LAYERS):
                x, _ = self.stack(name=f"layers_{i}")(x, None, deterministic)
        else:
            x, _ = self.stack(name="layers")(x, None, deterministic)
        return embed.attend(x)


PLAIN = {
    "scan": lambda block: Stack(nn.scan(block, **SCAN)),
    "unrolled": lambda block: Stack(block, unrolled=True),
}
Embed = compressed(nn.Embed, methods=embedding_methods)
WRAPPED = {
    "scan": lambda block: Stack(scan(block, **SCAN), embed=Embed),
    "nn.scan": lambda block: Stack(nn.scan(compressed(block), **SCAN), embed=Embed),
    "unrolled": lambda block: Stack(compressed(block), True, Embed),
    "unwrapped nn.scan": lambda block: Stack(nn.scan(block, **SCAN)),
    "unwrapped unrolled": lambda block: Stack(block, unrolled=True),
}
# For what holds of wrapped models only.
tied = pytest.mark.parametrize("kind", mostly_slow(k for k in WRAPPED if "unwrapped" not in k))


def make(kind, block=Compact):
    """A model for compressed parameters, the one that it was made of, and parameters of both."""
    is_unrolled = "unrolled" in kind
    plain_model = PLAIN["unrolled" if is_unrolled else "scan"](block)
    plain = init(plain_model)
    small = compress_params(plain, stacked=None if is_unrolled else "/layers/")
    return WRAPPED[kind](block), plain_model, plain, small


def init(model, *inputs):
    """Variables of a model, drawn by NumPy: initializers take seconds to compile."""
    inputs = inputs or (jnp.zeros((1, 2), jnp.int32),)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, WIDTH**-0.5, x.shape), x.dtype), shapes)


def generate(model, variables, tokens, steps=3):
    """Greedy, without a cache: each step shifts in the likeliest token."""

    def step(_, tokens):
        logits = model.apply(variables, tokens)
        return jnp.append(tokens[:, 1:], jnp.argmax(logits[:, -1:], axis=-1), axis=1)

    return jax.lax.fori_loop(0, steps, step, tokens)


def layers(model, variables, x):
    """The layers alone."""
    return model.stack().apply({"params": variables["params"]["layers"]}, x, None, True)[0]


def loss(model, variables, x):
    return jnp.sum(layers(model, variables, x).astype(jnp.float32))
