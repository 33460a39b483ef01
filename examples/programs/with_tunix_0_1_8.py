# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "df11_jax[orbax]", "google-tunix==0.1.7", "qwix==0.1.8", "flax==0.12.12", "jax==0.12.0.1",
#   "orbax-checkpoint==0.12.8",
# ]
# [tool.programs]
# # It has not been released, and needs what the release before it does.
# without-dependencies = [
#   "git+https://github.com/google/tunix@c7d8950f12a9c55a976bf2e1a0d8b447d71c20b3",
# ]
# ///
"""Tunix from 0.1.8 on: its checkpoints, in models that were compressed from other weights.

Its CheckpointManager saves and restores with Orbax's v1, for which df11_jax.orbax handles whatever
has compressed weights in it.
"""

import pathlib
import tempfile

import jax
import orbax.checkpoint as ocp
import with_tunix as tunix_models
from flax import nnx
from tunix.sft.checkpoint_manager import CheckpointManager

import df11_jax.nnx
import df11_jax.orbax  # from now on, v1 has a handler for compressed weights


def make(seed, spread):
    """A compressed model with adapters."""
    model = tunix_models.make(seed, spread)
    df11_jax.nnx.compress(model)
    return tunix_models.adapted(model)


def shapes(model):
    return [array.shape for array in jax.tree.leaves(nnx.state(model))]


def main():
    """A checkpoint of all weights, restored into a model whose arrays have other lengths."""
    model, other = make(0, 0.0), make(1, 1.0)
    assert shapes(other) != shapes(model)
    assert tunix_models.bits(other) != tunix_models.bits(model)
    with tempfile.TemporaryDirectory() as folder:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        manager = CheckpointManager(str(pathlib.Path(folder)), options)
        manager.save(1, model, force=True)
        assert manager.maybe_restore(other, step=1)[0] == 1
        manager.close()
    assert tunix_models.bits(other) == tunix_models.bits(model)
    print("CheckpointManager, into a model of other weights: the same logits")


if __name__ == "__main__":
    main()
