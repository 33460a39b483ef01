"""Training what is plain with optax, while all that is compressed is frozen.

    python examples/freeze.py

The layer is written for arrays, and knows nothing of compression. `optax.multi_transform` gets one
label for each compressed leaf, so that the optimizer keeps no state for the arrays inside. The same
steps are taken with plain weights: losses and all that is trained have to agree in every bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import df11_jax

WIDTH, STEPS = 256, 40


def is_compressed(leaf):
    """Whether a leaf is compressed: as `is_leaf`, it keeps tree functions out of these leaves."""
    return isinstance(leaf, df11_jax.DF11Array)


def labels_of(params):
    """A label for each leaf; matrices are frozen, plain or compressed."""
    return jax.tree.map(
        lambda leaf: "frozen" if leaf.ndim == 2 else "trained", params, is_leaf=is_compressed
    )


OPTIMIZER = optax.multi_transform(
    {"trained": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels_of
)


def loss_of(trained, frozen, x, y):
    """The mean squared error of two layers."""
    params = trained | frozen
    hidden = jax.nn.gelu(x @ params["up"] * params["scale"])
    out = hidden @ params["down"] + params["bias"]
    return jnp.square(out.astype(jnp.float32) - y).mean()


@functools.partial(jax.jit, donate_argnames=("params", "state"))
def train_step(params, state, x, y):
    """One update; returns (parameters, optimizer state, loss)."""
    labels = labels_of(params)
    trained = {name: leaf for name, leaf in params.items() if labels[name] == "trained"}
    frozen = {name: leaf for name, leaf in params.items() if labels[name] == "frozen"}
    loss, gradients = jax.value_and_grad(loss_of)(trained, frozen, x, y)
    # Frozen leaves have no gradients. Whatever is in their place, set_to_zero makes zeros of it,
    # and adding these to the arrays of a compressed leaf changes no bit of them.
    updates, state = OPTIMIZER.update(gradients | frozen, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(params):
    """Trains a copy; returns it, and the loss of each step."""
    x, y = jax.random.normal(jax.random.key(1), (2, 32, WIDTH))
    params = jax.tree.map(jnp.copy, params)
    state, losses = OPTIMIZER.init(params), []
    for _ in range(STEPS):
        params, state, loss = train_step(params, state, x.astype(jnp.bfloat16), y)
        losses.append(loss)
    return params, losses


def main():
    """Trains with plain and with compressed weights, and compares."""
    up, down = 0.05 * jax.random.normal(jax.random.key(0), (2, WIDTH, WIDTH))
    params = {
        "up": up.astype(jnp.bfloat16),
        "down": down.astype(jnp.bfloat16),
        "scale": jnp.ones(WIDTH),
        "bias": jnp.zeros(WIDTH),
    }
    small = df11_jax.compress_params(params)
    assert is_compressed(small["up"]) and is_compressed(small["down"])

    plain, compressed = train(params), train(small)
    for expected, leaf in zip(
        jax.tree.leaves(plain), jax.tree.leaves(df11_jax.decompress_params(compressed)), strict=True
    ):
        assert np.asarray(expected).tobytes() == np.asarray(leaf).tobytes()
    for before, after in zip(
        *map(jax.tree.leaves, (small["up"], compressed[0]["up"])), strict=True
    ):
        np.testing.assert_array_equal(after, before)
    losses = [float(loss) for loss in compressed[1]]
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps")
    assert losses[-1] < 0.9 * losses[0]
    print("losses and trained parameters are the same in every bit; frozen weights did not change")


if __name__ == "__main__":
    main()
