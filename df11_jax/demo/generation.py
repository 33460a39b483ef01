"""Text generation as jitted programs: one reads the prompt, one runs the token loop.

The loop is run some tokens at a time, so that its progress is seen. Both go through
`model.forward`, so the layer scan, and with compressed weights the decoding of each block, sits
inside the token loop: no decoded copy of the layers outlives a block.
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


@functools.partial(jax.jit, static_argnames="steps")
def first_token(
    logits: Float[Array, "batch vocab"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    steps: int,
) -> Generation:
    """Chooses the first of `steps` tokens, and makes room for all of them.

    Args:
        logits: the logits after the prompt, from `prefill`.
        key: the key for sampling; unused at temperature 0.
        temperature: the temperature of sampling; 0 takes the likeliest token. It is traced, so that
            changing it compiles nothing.
        steps: the number of tokens, static.
    """
    batch, vocab = logits.shape
    return Generation(
        jnp.zeros((batch, steps), jnp.int32).at[:, 0].set(_choose(logits, 0, key, temperature)),
        jnp.zeros((batch, steps, vocab), jnp.float32).at[:, 0].set(logits),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("generation", "cache"))
def next_tokens(
    params: model.Params,
    generation: Generation,
    cache: model.Cache,
    begin: Int[Array, ""] | int,
    end: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    config: model.Config,
) -> tuple[Generation, model.Cache]:
    """Chooses tokens `begin, ..., end - 1`, one after the other.

    Args:
        params: plain or compressed parameters.
        generation: the tokens before, from `first_token` or a former call; it is donated.
        cache: the cache of the tokens before `begin - 1`, from `prefill` or a former call; it is
            donated.
        begin: the number of tokens chosen so far, 1 or more.
        end: the number of tokens to have then.
        start: the number of tokens of the prompt.
        key: the key for sampling.
        temperature: the temperature of sampling.
        config: the configuration of the model, static.
    """

    def step(i: Array, state: tuple[Generation, model.Cache]) -> tuple[Generation, model.Cache]:
        (tokens, logits), cache = state
        last = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
        new, cache = model.forward(params, last, cache, start + i - 1, config)
        token = _choose(new[:, 0], i, key, temperature)
        return Generation(tokens.at[:, i].set(token), logits.at[:, i].set(new[:, 0])), cache

    return jax.lax.fori_loop(begin, end, step, (generation, cache))


def decode(
    params: model.Params,
    logits: Float[Array, "batch vocab"],
    cache: model.Cache,
    start: int,
    key: PRNGKeyArray,
    temperature: float,
    steps: int,
    config: model.Config,
) -> Generation:
    """Chooses `steps` tokens at once, for whoever need not see how far it is.

    Args:
        params: plain or compressed parameters.
        logits: the logits after the prompt, from `prefill`.
        cache: the cache of the prompt, from `prefill`; it is donated.
        start: the number of tokens of the prompt.
        key: the key for sampling; unused at temperature 0.
        temperature: the temperature of sampling; 0 takes the likeliest token.
        steps: the number of tokens.
        config: the configuration of the model, static.
    """
    generation = first_token(logits, key, temperature, steps)
    return next_tokens(params, generation, cache, 1, steps, start, key, temperature, config)[0]


def _choose(
    logits: Float[Array, "batch vocab"],
    step: Array | int,
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
) -> Int[Array, " batch"]:
    drawn = jax.random.categorical(
        jax.random.fold_in(key, step), logits / jnp.where(temperature > 0, temperature, 1)
    )
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))
