# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "penzai==0.2.5", "jax==0.12.0.1"]
# ///
"""penzai: parameters are taken out of a model, and decompressed before they are bound again.

Its named arrays look at the shapes of what they hold, and take no compressed array for one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from penzai import pz
from penzai.models.transformer.variants import llamalike_common

import df11_jax

CONFIG = llamalike_common.LlamalikeTransformerConfig(
    num_kv_heads=2,
    query_head_multiplier=2,
    embedding_dim=128,
    projection_dim=64,
    mlp_hidden_dim=512,
    num_decoder_blocks=2,
    vocab_size=256,
    mlp_variant="swiglu",
    tie_embedder_and_logits=True,
    parameter_dtype=jnp.bfloat16,
    activation_dtype=jnp.bfloat16,
)
TOKENS = pz.nx.wrap(jnp.arange(24).reshape(2, 12)).tag("batch", "seq")


def main():
    """Binds plain and compressed parameters to a transformer, and compares."""
    model = llamalike_common.build_llamalike_transformer(CONFIG, init_base_rng=jax.random.key(0))
    slots, params = pz.unbind_params(model, freeze=True)
    small = df11_jax.compress_params(params)
    report = df11_jax.size_report(small)
    print(f"{report.nbytes_before:,} bytes, compressed {report.nbytes:,}")
    assert report.nbytes < 0.7 * report.nbytes_before

    @jax.jit
    def run(params):
        model = pz.bind_variables(slots, df11_jax.decompress_params(params))
        return model(TOKENS, token_positions=pz.nx.arange("seq", 12)).unwrap(
            "batch", "seq", "vocabulary"
        )

    actual, expected = (np.asarray(run(p)).view(np.uint16) for p in (small, params))
    np.testing.assert_array_equal(actual, expected)
    print("the same logits")


if __name__ == "__main__":
    main()
