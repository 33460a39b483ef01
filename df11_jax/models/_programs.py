"""The two jitted programs of text generation: one reads the prompts, one runs the token loop.

Both call `_transformer.forward`, so the layer scan, and with compressed weights the decompression
of each block, is inside the token loop: no decompressed weights outlive their use. Where products
are fused (see `df11_jax.dot`), the token loop has no decompressed blocks at all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from df11_jax._product import is_fused_in
from df11_jax._promotion import with_promotion
from df11_jax.models import _cache, _transformer
from df11_jax.models._cache import Cache
from df11_jax.models._checks import check_rows
from df11_jax.models._config import Config
from df11_jax.models._devices import find_mesh, on_own_mesh
from df11_jax.models._layers import rms_norm
from df11_jax.models._parallel import cache_specs, on_each_device, on_one_device
from df11_jax.models._sampling import Sampling, choose
from df11_jax.models._sharding import STAGES, shard_config
from df11_jax.models._transformer import Params
from df11_jax.models.prompts import cache_length, padded_length

# Prompts are read in pieces of about this many tokens, all rows together: enough to be worth the
# decompression of all blocks for each piece, and few enough to need little memory.
PIECE_TOKENS = 2048
# What `decode` gives in the place of a token where none was chosen.
NO_TOKEN = -1


class State(NamedTuple):
    """The state of generation.

    Attributes:
        tokens: the tokens that were chosen last, and are not read yet.
        logits: the logits from which they were chosen.
        positions: their positions. Rows have prompts of different lengths, so each has its own.
        done: a flag for each row, whether a stop token was chosen; nothing comes after it.
        slot: the slot of the cache for these tokens.
        cache: the cache of all tokens before.
    """

    tokens: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]
    positions: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    slot: Int[Array, ""]
    cache: Cache


@functools.partial(jax.jit, static_argnames=("length", "config", "mesh"))
@with_promotion
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
        prompts: the prompts, padded at their beginnings with any tokens.
        lengths: the lengths of the prompts, at least 1.
        sampling: the way to choose tokens.
        keys: one key for each row.
        stop: tokens that end a row.
        length: the length of the cache, static.
        config: the configuration of the transformer, static.
        mesh: the mesh that the parameters are divided over, static; see `find_mesh`.

    Returns:
        The state after that, for `decode`.

    Raises:
        TypeError: the prompts are no array of integers.
        ValueError: the prompts are longer than the cache, or there is not a length and a key for
            each.
    """
    check_rows(prompts, lengths, keys, length)
    if mesh is not None:
        shard = shard_config(config, mesh.size, mesh.shape[STAGES])
        run = functools.partial(prefill, length=length, config=shard)
        everywhere = on_each_device(run, mesh, params, (P(),) * 5, _state_specs(config))
        return everywhere(params, prompts, lengths, sampling, keys, stop)
    # Positions begin as lengths, and would overflow the bytes or shorts that these may be.
    lengths = jnp.asarray(lengths, jnp.int32)
    batch, seq = prompts.shape
    size = min(seq, max(1, PIECE_TOKENS // batch))
    pieces = -(-seq // size)
    # Rows end together, so that the last slots have the last tokens of all of them.
    positions = jnp.arange(seq, dtype=jnp.int32) - (seq - lengths[:, None])
    positions = jnp.where(positions >= 0, positions, _cache.NOWHERE)

    def begin(i: Array) -> Array:
        # All pieces are equally long. The second one begins early enough for that; the tokens that
        # it reads again come out as before.
        return jnp.maximum(seq - (pieces - i) * size, 0)

    def piece(i: Array) -> _transformer.Piece:
        start = begin(i)
        tokens, places = (
            jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
            for array in (prompts, positions)
        )
        return tokens, places, start, begin(i + 1) - start

    cache = _cache.init_cache(config, batch, length)
    x, cache = _transformer.forward_pieces(params, piece, pieces, cache, config)
    last = rms_norm(x[:, -1], params["norm"], config)
    return _next(params, last, lengths, jnp.int32(seq), cache, sampling, keys, stop, config)


@functools.partial(jax.jit, static_argnames=("config", "room", "mesh"), donate_argnames=("state",))
@with_promotion
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
        state: the state from `prefill` or an earlier call, which is donated.
        steps: the most tokens to choose. No more are than `room`, and than its cache has room for.
        sampling: the way to choose tokens.
        keys: the keys that `prefill` got.
        stop: tokens that end a row.
        room: the number of tokens that the result has room for, static.
        config: the configuration of the transformer, static.
        mesh: the mesh that `prefill` got, static.

    Returns:
        The state, and the tokens chosen, `NO_TOKEN` after a row's stop token and after the last
        step.

    Raises:
        ValueError: there is room for no token.
    """
    if mesh is not None:
        shard = shard_config(config, mesh.size, mesh.shape[STAGES])
        run, specs = functools.partial(decode, room=room, config=shard), _state_specs(config)
        everywhere = on_each_device(run, mesh, params, (specs, *(P(),) * 4), (specs, P()))
        return everywhere(params, state, steps, sampling, keys, stop)

    if room < 1:
        raise ValueError(f"room is {room}, expected at least 1 token")
    # Those that the caller chose may be int64, where JAX is told to have it.
    state = state._replace(tokens=jnp.asarray(state.tokens, jnp.int32))
    left = _cache.capacity(state.cache, config) - state.slot
    steps = jnp.minimum(jnp.minimum(steps, room), left)

    def is_unfinished(loop: tuple[Array, State, Array]) -> Array:
        step, state, _ = loop
        return (step < steps) & ~jnp.all(state.done)

    def next_token(loop: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, out = loop
        tokens, positions = state.tokens[:, None], state.positions[:, None]
        x, cache = _transformer.forward(params, tokens, positions, state.slot, state.cache, config)
        after = (state.positions + 1, state.slot + 1, cache)
        new = _next(params, x[:, 0], *after, sampling, keys, stop, config)
        out = out.at[:, step].set(jnp.where(state.done, NO_TOKEN, new.tokens))
        return step + 1, new._replace(done=new.done | state.done), out

    out = jnp.full((state.tokens.size, room), NO_TOKEN, jnp.int32)
    _, state, out = jax.lax.while_loop(is_unfinished, next_token, (jnp.int32(0), state, out))
    return state, out


class Programs(NamedTuple):
    """The programs that `generate` runs, compiled; afterwards it need not compile them again.

    Attributes:
        prefill: the program that reads the prompts.
        decode: the program that runs the token loop.
        cache_bytes: the bytes of keys and values on each device.
    """

    prefill: jax.stages.Compiled
    decode: jax.stages.Compiled
    cache_bytes: int

    @property
    def fused(self) -> bool:
        """Whether the token loop multiplies blocks without decompressing them first."""
        return is_fused_in(self.decode)


def compile_programs(
    params: Params,
    config: Config,
    *,
    batch: int,
    prompt: int,
    tokens: int,
    sampling: Sampling | None = None,
    stops: int = 0,
    every: int = 8,
) -> Programs:
    """Compiles the programs that `generate` would run.

    Args:
        params: plain or compressed parameters, or their shapes, with shardings if they are
            divided.
        config: the configuration of the transformer.
        batch: the number of prompts.
        prompt: the number of tokens of the longest prompt.
        tokens: the number of tokens to generate for each.
        sampling: the way to choose them; None for the likeliest ones.
        stops: the number of stop tokens.
        every: the number of tokens between callbacks.
    """
    sampling = (sampling or Sampling()).checked()
    length = cache_length(prompt, tokens)
    padded, every = padded_length(prompt, tokens, length), min(every, length)
    prompts = jax.ShapeDtypeStruct((batch, padded), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    stop, mesh = jax.ShapeDtypeStruct((stops,), jnp.int32), find_mesh(params)
    with on_own_mesh(params):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        args = sampling, keys, stop
        lowered = prefill.lower(params, prompts, lengths, *args, length, config, mesh)
        first, state = lowered.compile(), lowered.out_info
        if mesh is not None:
            state = jax.tree.map(_with_sharding, state, first.output_shardings)
        second = decode.lower(params, state, every, *args, every, config, mesh).compile()
    return Programs(first, second, _cache.count_bytes(on_one_device(state.cache)))


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
    """Chooses the tokens at `positions`, from the transformer's outputs for those before."""
    logits = _transformer.project(params, x, config)
    tokens = choose(logits, sampling, jax.vmap(jax.random.fold_in)(keys, positions))
    return State(tokens, logits, positions, jnp.isin(tokens, stop), slot, cache)


def _state_specs(config: Config) -> State:
    """The sharding of the state: all of it is replicated, but for keys and values of the cache."""
    whole: Any = P()
    return State(whole, whole, whole, whole, whole, cache_specs(config))


def _with_sharding(shape: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
