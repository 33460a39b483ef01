"""LoRA adapters (arXiv 2106.09685), trained with optax through frozen compressed weights.

    python examples/lora.py

The adapters are in a collection of their own, "lora", and only they are differentiated. The same
steps are taken through the plain weights: losses and adapters have to agree in every bit.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import df11_jax.linen

VOCAB, WIDTH, HEADS, LAYERS, RANK = 256, 256, 4, 8, 8
BATCH, LENGTH, STEPS = 4, 64, 10

TEXT = (
    "Lossless compression keeps every bit of a weight. A frozen weight is read in the forward "
    "pass and again in the backward pass, and is never written: it can stay compressed. "
) * 3


class LoraDense(nn.Module):
    """`x w + (x a) b`, where `w` is frozen."""

    features: int

    @nn.compact
    def __call__(self, x):
        def draw_a():
            return nn.initializers.lecun_normal()(self.make_rng("params"), (x.shape[-1], RANK))

        a = self.variable("lora", "a", draw_a).value
        b = self.variable("lora", "b", jnp.zeros, (RANK, self.features)).value
        dense = nn.Dense(
            self.features, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name="base"
        )
        return dense(x) + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


class Block(nn.Module):
    """A causal transformer block, all of whose matrices have adapters."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(dtype=jnp.bfloat16, name="attention_norm")(x)
        query, key, value = (
            LoraDense(WIDTH, name=name)(y).reshape(*y.shape[:-1], HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(query, key, value, mask=nn.make_causal_mask(y[..., 0]))
        x = x + LoraDense(WIDTH, name="out")(mixed.reshape(y.shape))
        y = nn.RMSNorm(dtype=jnp.bfloat16, name="mlp_norm")(x)
        hidden = nn.silu(LoraDense(4 * WIDTH, name="gate")(y)) * LoraDense(4 * WIDTH, name="up")(y)
        return x + LoraDense(WIDTH, name="down")(hidden), None


SCAN = {
    "variable_axes": {"params": 0, "lora": 0},
    "split_rngs": {"params": True},
    "length": LAYERS,
}


class Model(nn.Module):
    """Logits of the next byte; `layers` is the class of all blocks."""

    layers: type[nn.Module]

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        x, _ = self.layers(name="layers")(embed(tokens), None)
        return embed.attend(nn.RMSNorm(dtype=jnp.bfloat16)(x))


# `scan` runs a block again in the backward pass, as `nn.remat` does. It has to: what was
# decompressed for the forward pass is gone.
COMPRESSED = Model(df11_jax.linen.scan(Block, **SCAN))
PLAIN = Model(nn.scan(nn.remat(Block, prevent_cse=False), **SCAN))

OPTIMIZER = optax.adam(2e-3)


def loss_of(lora, model, params, tokens):
    """Mean nats per byte."""
    logits = model.apply({"params": params, "lora": lora}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("lora", "state"))
def train_step(lora, state, model, params, tokens):
    """One update; returns (adapters, optimizer state, loss, gradients)."""
    loss, gradients = jax.value_and_grad(loss_of)(lora, model, params, tokens)
    updates, state = OPTIMIZER.update(gradients, state)
    return optax.apply_updates(lora, updates), state, loss, gradients


def initialise():
    """Frozen parameters, compressed ones, and adapters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables = jax.jit(PLAIN.init)(jax.random.key(0), tokens)
    params = variables["params"]
    return params, df11_jax.compress_params(params, stacked="^layers/"), variables["lora"]


def train(model, params, lora):
    """Trains new adapters; returns those, and for each step the loss and the gradients."""
    text = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    draws = np.random.default_rng(0)
    lora = jax.tree.map(jnp.copy, lora)
    state = OPTIMIZER.init(lora)
    history = []
    for _ in range(STEPS):
        starts = draws.integers(0, len(text) - LENGTH, BATCH)
        tokens = text[starts[:, None] + np.arange(LENGTH)]
        lora, state, loss, gradients = train_step(lora, state, model, params, tokens)
        history.append((loss, gradients))
    return lora, history


def peak_bytes(model, params, lora):
    """Device memory of a compiled step: all that goes in, and what it needs besides."""
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    state = OPTIMIZER.init(lora)
    memory = train_step.lower(lora, state, model, params, tokens).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main():
    """Trains through plain and through compressed weights, and compares."""
    params, small, lora = initialise()
    report = df11_jax.size_report(small)
    print(f"frozen weights: {report.nbytes_before:,} bytes, compressed {report.nbytes:,}")

    results = [train(PLAIN, params, lora), train(COMPRESSED, small, lora)]
    for plain, compressed in zip(*map(jax.tree.leaves, results), strict=True):
        plain, compressed = (np.asarray(leaf).view(np.uint32) for leaf in (plain, compressed))
        np.testing.assert_array_equal(compressed, plain)
    losses = [float(loss) for loss, _ in results[1][1]]
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f} nats per byte in {STEPS} steps")
    assert losses[-1] < 0.8 * losses[0]
    print("losses, gradients and adapters are the same in every bit")

    plain, compressed = peak_bytes(PLAIN, params, lora), peak_bytes(COMPRESSED, small, lora)
    print(f"memory of a step: {plain:,} bytes, compressed {compressed:,}: {compressed / plain:.2f}")
    if jax.default_backend() == "cpu":
        print("(XLA multiplies in float32 on a CPU, and keeps such copies of all plain weights.)")


if __name__ == "__main__":
    main()
