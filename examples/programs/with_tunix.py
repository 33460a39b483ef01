# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "df11_jax[orbax]", "google-tunix==0.1.7", "qwix==0.1.8", "flax==0.12.12", "jax==0.12.0.1",
#   "orbax-checkpoint==0.12.8",
# ]
# ///
"""Tunix: a model with LoRA on a compressed base, and its checkpoints.

Its CheckpointManager saves the arrays of compressed weights as they are, and restores them into a
model that has arrays of the same shapes: the model that was saved, or one that was compressed like
it. For models that were compressed from other weights, df11_jax.orbax reads the same checkpoint.
"""

import pathlib
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix
from flax import nnx

import df11_jax.nnx
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore

warnings.simplefilter("ignore")  # of the many packages that Tunix imports
from tunix.models.qwen3 import model as qwen3
from tunix.sft.checkpoint_manager import CheckpointManager

CONFIG = qwen3.ModelConfig(
    num_layers=2,
    vocab_size=256,
    embed_dim=128,
    hidden_dim=256,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_theta=500_000,
    use_tied_embedding=True,
)
LORA = qwix.LoraProvider(
    module_path=".*(q_proj|kv_proj|gate_proj|up_proj|down_proj)", rank=4, alpha=8
)
TOKENS = jnp.arange(1, 25, dtype=jnp.int32).reshape(2, 12)


def make(seed, spread=0.0):
    """A model with random bfloat16 weights; more exponents occur in it the larger `spread` is."""
    model = qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(0))
    draws = np.random.default_rng(seed)

    def draw(w):
        scale = 0.02 * np.exp(spread * draws.standard_normal(w.shape))
        return jnp.asarray(scale * draws.standard_normal(w.shape), jnp.bfloat16)

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


def adapted(model):
    """The model with adapters, none of them zero."""
    model = qwix.apply_lora_to_model(model, LORA, **model.get_model_input(), rngs=nnx.Rngs(1))
    lora = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda a: jnp.full_like(a, 0.01), lora))
    return model


@nnx.jit
def logits_of(model):
    batch, length = TOKENS.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return model(TOKENS, positions, None, mask)[0]


def bits(model):
    return np.asarray(logits_of(model)).tobytes()


def restore(folder, model):
    """What CheckpointManager.maybe_restore does, for a model that was compressed from others."""
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        target = DF11Restore(nnx.state(model))
        nnx.update(model, checkpointer.restore(folder / "model_params", args=target))


def main():
    """LoRA in either order, and checkpoints of adapters and of all weights."""
    plain = adapted(make(0))
    expected = bits(plain)
    assert expected != bits(make(0))
    model = make(0)
    df11_jax.nnx.compress(model)
    model = adapted(model)
    assert bits(model) == expected
    df11_jax.nnx.compress(plain)
    assert bits(plain) == expected
    print("LoRA after and before compression: the same logits")

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        manager = CheckpointManager(str(folder), options)
        manager.save(1, model, save_only_lora_params=True, force=True)
        manager.save(2, model, force=True)

        base = make(0)
        df11_jax.nnx.compress(base)
        base = qwix.apply_lora_to_model(base, LORA, **base.get_model_input(), rngs=nnx.Rngs(1))
        assert bits(base) != expected
        assert manager.maybe_restore(base, step=1, restore_only_lora_params=True)[0] == 1
        assert bits(base) == expected
        print("CheckpointManager, adapters: the same logits")

        nnx.update(base, jax.tree.map(jnp.zeros_like, nnx.state(base, nnx.LoRAParam)))
        assert manager.maybe_restore(base, step=2)[0] == 2
        assert bits(base) == expected
        print("CheckpointManager, all weights: the same logits")

        other = make(1, spread=1.0)
        df11_jax.nnx.compress(other)
        other = adapted(other)
        try:
            manager.maybe_restore(other, step=2)
        except ValueError as error:
            assert "Truncating/padding is disabled" in str(error)
        else:
            raise AssertionError("arrays of other shapes were restored")
        restore(folder / "2", other)
        assert bits(other) == expected
        print("df11_jax.orbax, into a model of other weights: the same logits")
        manager.close()


if __name__ == "__main__":
    main()
