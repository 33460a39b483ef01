# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "qwix==0.1.8", "flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8"]
# ///
"""qwix on a compressed model: LoRA, added before or after compression, and quantization.

qwix knows a weight by the array that the module has read. A block has two weights of one shape
here, which it cannot tell apart otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import linen as nn
from flax import nnx

import df11_jax.nnx

WIDTH, LAYERS, STEPS = 128, 3, 5
X = jax.random.normal(jax.random.key(1), (4, WIDTH)).astype(jnp.bfloat16)
LORA = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
INT8 = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)])


def matmul(x, w):
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def draw(key, shape, dtype=jnp.bfloat16):
    return (0.05 * jax.random.normal(key, shape)).astype(dtype)


class Block(nnx.Module):
    """A gated layer: `gate` and `up` have one shape."""

    def __init__(self, rngs):
        self.gate, self.up = (nnx.Param(draw(rngs.params(), (WIDTH, 2 * WIDTH))) for _ in range(2))
        self.down = nnx.Param(draw(rngs.params(), (2 * WIDTH, WIDTH)))

    def __call__(self, x):
        hidden = nnx.silu(matmul(x, self.gate[...])) * matmul(x, self.up[...])
        return x + matmul(hidden, self.down[...])


class Model(nnx.Module):
    """Some blocks."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class LinenBlock(nn.Module):
    """The same in linen."""

    @nn.compact
    def __call__(self, x):
        gate, up = (self.param(name, draw, (WIDTH, 2 * WIDTH)) for name in ("gate", "up"))
        hidden = nn.silu(matmul(x, gate)) * matmul(x, up)
        return x + matmul(hidden, self.param("down", draw, (2 * WIDTH, WIDTH)))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def compressed(model):
    df11_jax.nnx.compress(model)
    assert len(nnx.to_flat_state(nnx.state(model, df11_jax.nnx.CompressedParam))) == 3 * LAYERS
    return model


def adapted(model):
    """The model with adapters, of which qwix begins with B as zeros."""
    return qwix.apply_lora_to_model(model, LORA, X, rngs=nnx.Rngs(2))


@nnx.jit
def train_step(model, optimizer):
    """One update of the adapters; returns the loss."""

    def loss_of(model):
        return jnp.square(model(X).astype(jnp.float32) - 1).mean()

    trained = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(loss_of, argnums=trained)(model)
    optimizer.update(model, gradients)
    return loss


def train(model):
    """Trains adapters; returns losses and adapters."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    losses = [train_step(model, optimizer) for _ in range(STEPS)]
    return losses, nnx.state(model, nnx.LoRAParam)


def main():
    """LoRA in either order, quantization, and both in linen."""
    losses, adapters = plain = train(adapted(Model()))
    assert len(jax.tree.leaves(adapters)) == 2 * 3 * LAYERS and losses[-1] < losses[0]
    assert bits(train(adapted(compressed(Model())))) == bits(plain)
    assert bits(train(compressed(adapted(Model())))) == bits(plain)
    print("LoRA after and before compression: the same losses and adapters")

    run = nnx.jit(lambda model: model(X))
    quantized = qwix.quantize_model(Model(), INT8, X)
    from_compressed = qwix.quantize_model(compressed(Model()), INT8, X)
    assert bits(nnx.state(from_compressed)) == bits(nnx.state(quantized))
    expected = bits(run(quantized))
    df11_jax.nnx.compress(quantized, min_size=1)  # scales of quantized weights stay plain
    assert bits(run(quantized)) == expected != bits(run(Model()))
    print("PtqProvider: the same quantized weights from compressed ones")

    block = qwix.apply_lora_to_model(LinenBlock(), LORA)
    params = block.init(jax.random.key(0), X)["params"]
    adapters = {name: jnp.ones_like(leaf) for name, leaf in params.items() if "lora" in name}
    assert len(adapters) == 6
    params |= adapters
    small = df11_jax.compress_params(params, include="^(gate|up|down)$")
    apply = jax.jit(lambda params: block.apply({"params": params}, X))
    assert (
        bits(apply(small))
        == bits(apply(params))
        != bits(apply(params | {"up_lora_b": 0 * params["up_lora_b"]}))
    )
    print("linen, LoRA: the same outputs")


if __name__ == "__main__":
    main()
