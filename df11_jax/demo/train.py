"""Trains the bundled demo model on the text of Python's own help topics.

    pip install ".[train]"
    python -m df11_jax.demo.train --out checkpoint.safetensors

The text is `pydoc_data.topics`, part of Python under the PSF licence, read byte by byte. The
bundled checkpoint was made by this script, with its defaults, on a CPU with Python 3.11.7,
jax 0.10.2, flax 0.12.8 and optax 0.2.8. The topics change between Python versions, and the sums
of a matrix product between machines, so elsewhere expect an equally good model, not equal bits.
It ends at 1.185 nats (1.71 bits) per held-out byte; that loss also told when to stop, after about
seven passes over the text: with 2000 steps and a tenth of the weight decay it came to 1.43.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from df11_jax.demo import checkpoint, model

# Float32 activations take a CPU no longer than bf16 ones, and are not rounded.
CONFIG = dataclasses.replace(model.Config(), dtype=jnp.float32)
HELD_OUT_TOPICS = ("execmodel", "import")  # 5% of the text, never trained on
WINDOW = 256
BATCH = 8
PEAK_LEARNING_RATE = 2e-3


def load_text() -> tuple[UInt8[np.ndarray, " train"], UInt8[np.ndarray, " held_out"]]:
    """The bytes to train on and those held out.

    Topics quote each other, a short one often being a section of a long one. Each paragraph is
    kept once, where it comes first with the held-out topics and then the longest ones in front,
    so no held-out paragraph is among those trained on.
    """
    order = sorted(topics, key=lambda name: (name not in HELD_OUT_TOPICS, -len(topics[name])))
    seen: set[str] = set()
    train: list[str] = []
    held_out: list[str] = []
    for name in order:
        fresh = [p for p in topics[name].split("\n\n") if p.strip() not in seen]
        seen.update(p.strip() for p in fresh)
        (held_out if name in HELD_OUT_TOPICS else train).append("\n\n".join(fresh))
    return _as_bytes(train), _as_bytes(held_out)


def _as_bytes(parts: list[str]) -> UInt8[np.ndarray, " bytes"]:
    return np.frombuffer("\n\n\n".join(parts).encode(), np.uint8)


def cross_entropy(
    params: model.Params, windows: Int[Array, "batch window"]
) -> Float[Array, "batch predicted"]:
    """Nats for each byte of the windows but the first, given the bytes before it."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    cache = model.init_cache(CONFIG, *inputs.shape)
    logits, _ = model.forward(params, inputs, cache, 0, CONFIG)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW under a warmed-up cosine schedule.

    The text is read several times over, hence the strong weight decay. Norm scales are spared.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LEARNING_RATE, steps // 20, steps, PEAK_LEARNING_RATE / 50
    )

    def decayed(params: model.Params) -> model.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in jax.tree_util.keystr(path), params
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=1.0, mask=decayed),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    optimizer: optax.GradientTransformation,
    params: model.Params,
    state: optax.OptState,
    windows: Int[Array, "batch window"],
) -> tuple[model.Params, optax.OptState, Float[Array, ""]]:
    """One update; returns (params, optimizer state, mean loss in nats per byte)."""
    loss, gradients = jax.value_and_grad(lambda p: cross_entropy(p, windows).mean())(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


@jax.jit
def _held_out_losses(
    params: model.Params, windows: Int[Array, "batch window"]
) -> Float[Array, "batch predicted"]:
    return cross_entropy(params, windows)


def held_out_loss(params: model.Params, text: UInt8[np.ndarray, " held_out"]) -> float:
    """Mean nats per byte, each byte predicted once, from at least half a window before it.

    Only the first half window of the text has less to go by.
    """
    stride = WINDOW // 2
    starts = np.arange(0, len(text) - WINDOW, stride)
    windows = text[starts[:, None] + np.arange(WINDOW + 1)].astype(np.int32)
    losses = np.concatenate([_held_out_losses(params, w) for w in np.array_split(windows, 10)])
    return float(np.concatenate([losses[0, :stride], losses[:, stride:].ravel()]).mean())


def round_to_bf16(params: model.Params) -> model.Params:
    """The parameters as they are shipped: rounded to nearest even."""
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)


def main() -> None:
    """Trains the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=train_model.__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    train_model(**vars(parser.parse_args()))


def train_model(out: pathlib.Path, steps: int, seed: int) -> None:
    """Trains from scratch and writes the bf16 parameters to a file."""
    train, held_out = load_text()
    params = model.init_params(jax.random.key(seed), CONFIG)
    count = sum(a.size for a in jax.tree.leaves(params))
    print(f"{count:,} parameters, {len(train):,} bytes, {len(held_out):,} held out")

    optimizer = make_optimizer(steps)
    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    losses, began = [], time.monotonic()
    for step in range(1, steps + 1):
        starts = rng.integers(0, len(train) - WINDOW, BATCH)
        windows = train[starts[:, None] + np.arange(WINDOW + 1)].astype(np.int32)
        params, state, loss = train_step(optimizer, params, state, windows)
        losses.append(loss)
        if step % 100 == 0 or step == steps:
            shipped = round_to_bf16(params)
            print(
                f"step {step:5d}  train {np.mean(losses):.3f}  "
                f"held out {held_out_loss(shipped, held_out):.3f} nats/byte  "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
            checkpoint.save(shipped, out)  # an interrupted run leaves its latest parameters
            losses = []


if __name__ == "__main__":
    main()
