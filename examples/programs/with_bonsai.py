# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "flax==0.12.12", "jax==0.12.0.1", "pillow"]
# [tool.programs]
# # It asks for a version of jax that is too old for df11_jax, and runs on newer ones.
# without-dependencies = [
#   "git+https://github.com/jax-ml/bonsai@36284254cf738d99c1c5d1e3a292d27656a0a365",
# ]
# ///
"""bonsai: its Qwen 3, unchanged, with its cache."""

import jax
import jax.numpy as jnp
import numpy as np
from bonsai.models.qwen3 import modeling
from flax import nnx

import df11_jax.nnx

CONFIG = modeling.ModelConfig(
    num_layers=2,
    vocab_size=256,
    emb_dim=128,
    mlp_dim=256,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    rope_theta=1_000_000,
    rope_scaling_factor=8.0,
    local_rope_theta=1e4,
    norm_eps=1e-6,
    tie_word_embeddings=False,
)
TOKENS = jnp.arange(1, 25, dtype=jnp.int32).reshape(2, 12)


@nnx.jit
def forward(model, cache, tokens):
    """Logits of the next token after some; changes the cache."""
    logits = model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))
    return logits[:, -1]


def generate(model, steps=6):
    """The logits of some steps, each with the likeliest token of the one before."""
    cache = nnx.List(
        [modeling.LayerCache(CONFIG, 2, 32, jnp.bfloat16) for _ in range(CONFIG.num_layers)]
    )
    tokens, logits = TOKENS, []
    for _ in range(steps):
        logits.append(forward(model, cache, tokens))
        tokens = jnp.argmax(logits[-1], axis=-1)[:, None].astype(jnp.int32)
    return np.asarray(jnp.stack(logits))


def main():
    """Generates with plain and with compressed weights, and compares."""
    model = modeling.Qwen3(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda w: w.astype(jnp.bfloat16), state))
    expected = generate(model)
    df11_jax.nnx.compress(model)
    report = df11_jax.size_report(nnx.state(model))
    print(f"{report.nbytes_before:,} bytes, compressed {report.nbytes:,}")
    assert report.nbytes < 0.7 * report.nbytes_before
    assert generate(model).tobytes() == expected.tobytes()
    print("the same logits")


if __name__ == "__main__":
    main()
