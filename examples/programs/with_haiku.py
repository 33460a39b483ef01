# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "dm-haiku==0.0.17", "jax==0.12.0.1"]
# ///
"""Haiku: a transformed function takes compressed parameters as they are."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import df11_jax

WIDTH = 128


def forward(x):
    for _ in range(2):
        x = x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(4 * WIDTH)(x)))
    return x


def main():
    """Applies plain and compressed parameters, and compares."""
    model = hk.without_apply_rng(hk.transform(forward))
    x = jax.random.normal(jax.random.key(1), (3, WIDTH)).astype(jnp.bfloat16)
    params = model.init(jax.random.key(0), x)
    small = df11_jax.compress_params(params)
    assert isinstance(small["linear"]["w"], df11_jax.DF11Array)
    run = jax.jit(model.apply)
    actual, expected = (np.asarray(run(p, x)).view(np.uint16) for p in (small, params))
    np.testing.assert_array_equal(actual, expected)
    print("the same outputs")


if __name__ == "__main__":
    main()
