"""Text generation as two jitted programs: one reads the prompt, one runs the token loop.

Both go through `model.forward`, so the layer scan, and with compressed weights the decoding of
each block, sits inside the token loop: no decoded copy of the layers outlives a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from df11_jax.demo import model


class Generation(NamedTuple):
    """Tokens and the float32 logits each was chosen from."""

    tokens: Int[Array, "batch new"]
    logits: Float[Array, "batch new vocab"]


@functools.partial(jax.jit, static_argnames=("length", "config"))
def prefill(
    params: model.Params,
    prompt: Int[Array, "batch seq"],
    length: int,
    config: model.Config,
) -> tuple[Float[Array, "batch vocab"], model.Cache]:
    """Reads the prompt: the logits after its last token and a cache of static `length`."""
    cache = model.init_cache(config, prompt.shape[0], length)
    logits, cache = model.forward(params, prompt, cache, 0, config)
    return logits[:, -1], cache


@functools.partial(jax.jit, static_argnames=("steps", "config"))
def decode(
    params: model.Params,
    logits: Float[Array, "batch vocab"],
    cache: model.Cache,
    start: Int[Array, ""] | int,
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    steps: int,
    config: model.Config,
) -> Generation:
    """Chooses `steps` tokens, one after the other.

    Args:
        params: plain or compressed parameters.
        logits: the logits after the last token so far, from `prefill`.
        cache: the cache of the `start` tokens so far, from `prefill`, with room for `steps - 1`
            more.
        start: the number of tokens so far.
        key: the key for sampling; unused at temperature 0.
        temperature: the temperature of sampling; 0 takes the likeliest token. It is traced, so that
            changing it compiles nothing.
        steps: the number of tokens to choose, static.
        config: the configuration of the model, static.
    """

    def choose(logits: Array, step: Array | int) -> Array:
        drawn = jax.random.categorical(
            jax.random.fold_in(key, step), logits / jnp.where(temperature > 0, temperature, 1)
        )
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))

    def next_token(
        step: Array, state: tuple[Generation, model.Cache]
    ) -> tuple[Generation, model.Cache]:
        generation, cache = state
        token = choose(generation.logits[:, step], step)
        logits, cache = model.forward(params, token[:, None], cache, start + step, config)
        return Generation(
            generation.tokens.at[:, step].set(token),
            generation.logits.at[:, step + 1].set(logits[:, 0]),
        ), cache

    batch, vocab = logits.shape
    empty = Generation(
        jnp.zeros((batch, steps), jnp.int32),
        jnp.zeros((batch, steps, vocab), jnp.float32).at[:, 0].set(logits),
    )
    # The last token is only chosen: nothing is left to predict after it.
    (tokens, logits), _ = jax.lax.fori_loop(0, steps - 1, next_token, (empty, cache))
    last = choose(logits[:, -1], steps - 1)
    return Generation(tokens.at[:, -1].set(last), logits)
