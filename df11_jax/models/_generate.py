"""Text generation: the loop on the host, which runs the two programs and collects the tokens."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from df11_jax._brief import brief
from df11_jax.models._config import Config
from df11_jax.models._devices import find_mesh, on_own_mesh
from df11_jax.models._programs import NO_TOKEN, decode, prefill
from df11_jax.models._sampling import Sampling, check_integers
from df11_jax.models._transformer import Params
from df11_jax.models.prompts import check_prompts, pad_prompts, padded_length


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: Config,
    *,
    tokens: int = 100,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
    length: int | None = None,
    every: int = 8,
    callback: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Continues prompts.

    Args:
        params: plain or compressed parameters.
        prompts: the tokens of each prompt; their numbers may differ.
        config: the configuration of the transformer.
        tokens: the most tokens to generate for each prompt.
        sampling: the way to choose them; None for the likeliest ones.
        seed: the seed of sampling.
        stop: tokens that end a row; they are not returned.
        length: the length of the key-value cache; None for what is needed, rounded up so that
            prompts of similar lengths share a program.
        every: the number of tokens to generate between calls of `callback`.
        callback: a function that is called with the new tokens of each prompt, as they come.

    Returns:
        The new tokens of each prompt.

    Raises:
        TypeError: what should be an integer is none; the message names it.
        ValueError: there are no prompts, or one is no sequence, is empty, has tokens that the model
            does not know, or is too long for the cache; or a number, which the message names, makes
            no sense.
    """
    sampling, prompts = (sampling or Sampling()).checked(), list(prompts)
    check_integers(tokens=tokens, seed=seed, every=every)
    if not 0 <= seed < 2**32:
        # All that jax.random.key tells apart.
        raise ValueError(f"seed is {seed}, expected 0 to {2**32 - 1}")
    if every < 1:
        raise ValueError(f"every is {every}, expected at least 1")
    if length is not None:
        check_integers(length=length)
    length = check_prompts(prompts, config, tokens, length)
    every = min(every, length)  # the results of a call have room for as many tokens
    longest = max(map(len, prompts))
    padded = pad_prompts(prompts, padded_length(longest, tokens, length))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop is {brief(stop)}, expected the tokens that end a row")
    stop = stop.tolist() if isinstance(stop, (jax.Array, np.ndarray)) else list(stop)
    check_integers(**{f"stop[{i}]": token for i, token in enumerate(stop)})
    stop = [token for token in stop if 0 <= token < 2**31]  # the others are no tokens of a model
    stops = np.array(sorted(set(stop)), np.int32)
    ends = {NO_TOKEN, *stop}
    mesh = find_mesh(params)

    generated: list[list[int]] = [[] for _ in prompts]

    def add(new: Int[np.ndarray, "batch some"]) -> None:
        rows = [[t for t in row if t not in ends] for row in new.tolist()]
        for row, more in zip(generated, rows, strict=True):
            row += more
        if callback is not None and any(rows):
            callback(rows)

    with on_own_mesh(params):
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        state = prefill(params, padded, lengths, sampling, keys, stops, length, config, mesh)
    add(np.asarray(state.tokens)[:, None])
    left = tokens - 1
    while left and not np.asarray(state.done).all():
        steps = min(left, every)
        with on_own_mesh(params):
            state, out = decode(params, state, steps, sampling, keys, stops, every, config, mesh)
        add(np.asarray(out))
        left -= steps
    return generated
