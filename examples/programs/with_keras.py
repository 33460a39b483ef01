# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "keras==3.15.1", "keras-hub==0.32.0", "jax==0.12.0.1"]
# ///
"""Keras on JAX: stateless_call and keras-hub's generate with compressed variables.

Layers are used as they are. Keras asks for arrays when it enters a scope of states, so that all
weights are decompressed at the beginning of a jitted function: what is saved is what lies in memory
between calls.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import keras_hub
import numpy as np

import df11_jax

VOCAB, LENGTH = 256, 24


def make_model():
    """A small Llama with random bfloat16 weights."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCAB,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=128,
        intermediate_dim=256,
        dtype="bfloat16",
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def generate_with(model, weights):
    """Makes `model.generate` use these values of its variables."""

    @jax.jit
    def generate(inputs, weights):
        with keras.StatelessScope(state_mapping=list(zip(model.variables, weights, strict=True))):
            return model.generate_step(inputs)

    model.generate_function = lambda inputs, stop_token_ids=None: generate(inputs, weights)


def main():
    """Calls a model and generates with plain and with compressed variables, and compares."""
    model = make_model()
    prompt = {
        "token_ids": np.tile(np.arange(1, LENGTH + 1), (2, 1)),
        "padding_mask": np.tile(np.arange(LENGTH) < 8, (2, 1)),
    }
    plain = [variable.value for variable in model.variables]
    small = df11_jax.compress_params(plain)
    report = df11_jax.size_report(small)
    print(f"{report.nbytes_before:,} bytes, compressed {report.nbytes:,}")
    assert report.nbytes < 0.7 * report.nbytes_before

    @jax.jit
    def call(trainable):
        return model.stateless_call(trainable, model.non_trainable_variables, prompt)[0]

    assert len(model.trainable_variables) == len(model.variables)
    assert np.asarray(call(small)).tobytes() == np.asarray(call(plain)).tobytes()
    print("stateless_call: the same logits")

    expected = model.generate(prompt, stop_token_ids=None)["token_ids"]
    generate_with(model, small)
    for variable, leaf in zip(model.variables, small, strict=True):
        if isinstance(leaf, df11_jax.DF11Array):
            variable.value.delete()  # of these weights, no others are left
    tokens = model.generate(prompt, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(tokens, expected)
    assert (tokens[:, 8:] != prompt["token_ids"][:, 8:]).any()
    print("generate: the same tokens")


if __name__ == "__main__":
    main()
