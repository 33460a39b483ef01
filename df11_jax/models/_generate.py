"""Text generation as two jitted programs: one reads the prompts, one runs the token loop.

Both go through `_transformer.forward`, so the layer scan, and with compressed weights the decoding
of each block, sits inside the token loop: no decoded copy of the weights outlives its use.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from df11_jax.models import _cache, _transformer
from df11_jax.models._cache import Cache
from df11_jax.models._config import Config
from df11_jax.models._parallel import cache_specs, find_mesh, on_each_device
from df11_jax.models._sampling import Sampling, choose
from df11_jax.models._shares import share_of
from df11_jax.models._transformer import Params

# Prompts and caches of about the same length share a program.
BUCKET = 64
# Prompts are read in pieces of about as many tokens of all rows together: enough to make up for
# decompressing all blocks once a piece, few enough to need little memory.
PIECE_TOKENS = 2048
NO_TOKEN = -1


class State(NamedTuple):
    """Where generation is.

    Attributes:
        tokens: chosen last, and not read yet.
        logits: that they were chosen from.
        positions: theirs. Rows have prompts of different lengths, so each has its own.
        done: rows whose token is a stop token; nothing comes after it.
        slot: of the cache, for the tokens.
        cache: of all tokens before.
    """

    tokens: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]
    positions: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    slot: Int[Array, ""]
    cache: Cache


@functools.partial(jax.jit, static_argnames=("length", "config", "mesh"))
def prefill(
    params: Params,
    prompts: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    sampling: Sampling,
    keys: PRNGKeyArray,
    stop: Int[Array, " stops"],
    length: int,
    config: Config,
    mesh: Mesh | None = None,
) -> State:
    """Reads the prompts, and chooses the first tokens.

    Args:
        params: plain or compressed parameters.
        prompts: filled up at their beginnings, with any tokens.
        lengths: of the prompts, at least 1.
        sampling: how to choose tokens.
        keys: one for each row.
        stop: tokens that end a row.
        length: of the cache, static.
        config: of the decoder, static.
        mesh: that the parameters are divided over, static; see `find_mesh`.

    Returns:
        Where generation is then, for `decode`.

    Raises:
        ValueError: the prompts are longer than the cache.
    """
    if mesh is not None:
        share = share_of(config, mesh.size)
        run = functools.partial(prefill, length=length, config=share)
        everywhere = on_each_device(run, mesh, params, (P(),) * 5, _state_specs(config))
        return everywhere(params, prompts, lengths, sampling, keys, stop)
    batch, seq = prompts.shape
    if seq > length:
        raise ValueError(f"prompts have {seq} tokens, but the cache has room for {length}")
    size = min(seq, max(1, PIECE_TOKENS // batch))
    pieces = -(-seq // size)
    # Rows end together: the last tokens of all of them are then those in the last slots.
    positions = jnp.arange(seq, dtype=jnp.int32) - (seq - lengths[:, None])
    positions = jnp.where(positions >= 0, positions, _cache.NOWHERE)

    def begin(i: Array) -> Array:
        # All pieces are equally long. The second one begins early enough for that; what it reads
        # again comes out as before.
        return jnp.maximum(seq - (pieces - i) * size, 0)

    def read(i: Array, state: tuple[Array, Cache]) -> tuple[Array, Cache]:
        _, cache = state
        start = begin(i)
        tokens, places = (
            jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
            for array in (prompts, positions)
        )
        keep = begin(i + 1) - start
        x, cache = _transformer.forward(params, tokens, places, start, cache, config, keep)
        return x[:, -1], cache

    last = jnp.zeros((batch, config.dim), config.dtype)
    cache = _cache.init_cache(config, batch, length)
    last, cache = jax.lax.fori_loop(0, pieces, read, (last, cache))
    return _next(params, last, lengths, jnp.int32(seq), cache, sampling, keys, stop, config)


@functools.partial(jax.jit, static_argnames=("config", "room", "mesh"), donate_argnames=("state",))
def decode(
    params: Params,
    state: State,
    steps: Int[Array, ""] | int,
    sampling: Sampling,
    keys: PRNGKeyArray,
    stop: Int[Array, " stops"],
    room: int,
    config: Config,
    mesh: Mesh | None = None,
) -> tuple[State, Int[Array, "batch room"]]:
    """Chooses tokens, one after the other, until all rows are done.

    Args:
        params: plain or compressed parameters.
        state: from `prefill`, or a former call; it is used up. Its cache has room for `steps`
            more tokens.
        steps: the most tokens to choose, no more than `room`.
        sampling: how to choose tokens.
        keys: those of `prefill`.
        stop: tokens that end a row.
        room: for tokens, static.
        config: of the decoder, static.
        mesh: that of `prefill`, static.

    Returns:
        The state, and the tokens chosen, `NO_TOKEN` after a row's stop token and after `steps`.
    """
    if mesh is not None:
        share = share_of(config, mesh.size)
        run, specs = functools.partial(decode, room=room, config=share), _state_specs(config)
        everywhere = on_each_device(run, mesh, params, (specs, *(P(),) * 4), (specs, P()))
        return everywhere(params, state, steps, sampling, keys, stop)

    def is_unfinished(loop: tuple[Array, State, Array]) -> Array:
        step, state, _ = loop
        return (step < steps) & ~jnp.all(state.done)

    def next_token(loop: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, out = loop
        tokens, positions = state.tokens[:, None], state.positions[:, None]
        x, cache = _transformer.forward(params, tokens, positions, state.slot, state.cache, config)
        place = (state.positions + 1, state.slot + 1, cache)
        new = _next(params, x[:, 0], *place, sampling, keys, stop, config)
        out = out.at[:, step].set(jnp.where(state.done, NO_TOKEN, new.tokens))
        return step + 1, new._replace(done=new.done | state.done), out

    out = jnp.full((state.tokens.size, room), NO_TOKEN, jnp.int32)
    _, state, out = jax.lax.while_loop(is_unfinished, next_token, (jnp.int32(0), state, out))
    return state, out


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
        prompts: tokens of each; they may differ in length.
        config: of the decoder.
        tokens: how many to generate for each prompt, at most.
        sampling: how to choose them; None for the likeliest ones.
        seed: for sampling.
        stop: tokens that end a row, themselves not returned.
        length: of the key-value cache; None for as long as is needed.
        every: how many tokens to generate between calls of `callback`.
        callback: gets the new tokens of each prompt, as they come.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: there are no prompts, or one is empty, has tokens that the model does not know,
            or is too long for the cache; a number makes no sense; the message names it.
    """
    sampling = (sampling or Sampling()).checked()
    if every < 1:
        raise ValueError(f"every is {every}, expected at least 1")
    length = check_prompts(prompts, config, tokens, length)
    longest = max(map(len, prompts))
    padded = np.zeros((len(prompts), padded_length(longest, tokens, length)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
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

    state = prefill(params, padded, lengths, sampling, keys, stops, length, config, mesh)
    add(np.asarray(state.tokens)[:, None])
    left = tokens - 1
    while left and not np.all(state.done):
        steps = min(left, every)
        state, out = decode(params, state, steps, sampling, keys, stops, every, config, mesh)
        add(np.asarray(out))
        left -= steps
    return generated


def cache_length(prompt: int, tokens: int) -> int:
    """The length that `generate` gives the cache, for the longest prompt and tokens to come."""
    return _round_up(_round_up(prompt) + tokens - 1)  # the last one is only chosen


def padded_length(prompt: int, tokens: int, length: int) -> int:
    """The length that `generate` fills prompts up to, to leave room for tokens in the cache."""
    return min(_round_up(prompt), length - (tokens - 1))


def check_prompts(
    prompts: Sequence[Sequence[int]], config: Config, tokens: int, length: int | None = None
) -> int:
    """The length that the cache is to have.

    Raises:
        ValueError: as `generate`.
    """
    if not len(prompts):
        raise ValueError("prompts is empty: expected at least one prompt")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, expected at least 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty: expected at least one token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab:
            raise ValueError(
                f"prompts[{i}] has tokens from {min(prompt)} to {max(prompt)}, expected 0 to "
                f"{config.vocab - 1}"
            )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    needed = len(prompts[longest]) + tokens - 1
    room, whose = config.max_length, "the model was made for"
    if length is not None and length < room:
        room, whose = length, "the cache has room for"
    if needed > room:
        raise ValueError(
            f"prompts[{longest}] has {len(prompts[longest])} tokens, and {tokens} more are wanted, "
            f"but {whose} {room} positions"
        )
    return cache_length(len(prompts[longest]), tokens) if length is None else length


def _next(
    params: Params,
    x: Float[Array, "batch dim"],
    positions: Int[Array, " batch"],
    slot: Int[Array, ""],
    cache: Cache,
    sampling: Sampling,
    keys: PRNGKeyArray,
    stop: Int[Array, " stops"],
    config: Config,
) -> State:
    """Chooses the tokens at `positions`, from what the decoder made of those before."""
    logits = _transformer.project(params, x, config)
    tokens = choose(logits, sampling, jax.vmap(jax.random.fold_in)(keys, positions))
    return State(tokens, logits, positions, jnp.isin(tokens, stop), slot, cache)


def _state_specs(config: Config) -> State:
    """How the state is sharded: all devices have all of it, but of the cache their heads."""
    whole: Any = P()
    return State(whole, whole, whole, whole, whole, cache_specs(config))


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
