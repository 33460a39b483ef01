"""A request to generate text, its two programs, and the result of running them."""

import dataclasses
import hashlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from df11_jax._scan import scan_blocks
from df11_jax._take import scan_pieces
from df11_jax.models import Config, Params, Sampling, decode, prefill, tables
from df11_jax.models.prompts import BUCKET

STEP = BUCKET  # caches are multiples of it, as those that `generate` makes


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for the likeliest tokens after random prompts, none of which ends early.

    Attributes:
        batch: the number of prompts.
        prompt: the number of tokens of each prompt.
        tokens: the number of tokens to choose for each prompt, at least 2. The program that reads
            the prompts chooses the first.
    """

    batch: int
    prompt: int
    tokens: int

    @property
    def steps(self) -> int:
        """The steps of the token loop."""
        return self.tokens - 1

    @property
    def length(self) -> int:
        """The length of the cache. The token chosen last is not read any more."""
        return -(-(self.prompt + self.steps) // STEP) * STEP

    def inputs(self, config: Config) -> tuple[Any, ...]:
        """The inputs of `prefill` beside the parameters."""
        key, shape = jax.random.key(self.batch), (self.batch, self.prompt)
        prompts = jax.random.randint(key, shape, 0, config.vocab, jnp.int32)
        lengths = jnp.full(self.batch, self.prompt, jnp.int32)
        return prompts, lengths, *self._rest()

    def step_inputs(self) -> tuple[Any, ...]:
        """The inputs of `decode` beside parameters and state."""
        return jnp.int32(self.steps), *self._rest()

    def _rest(self) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), self.batch)
        return Sampling(), keys, jnp.zeros(0, jnp.int32)


class RequestPrograms(NamedTuple):
    """The programs of a request: traced, or compiled."""

    prefill: Any
    decode: Any


class Result(NamedTuple):
    """What came of a request, and how long it took.

    Attributes:
        prefill_seconds: the seconds of reading the prompts, each time.
        decode_seconds: the seconds of all steps of the token loop, each time.
        tokens: all tokens that were chosen.
        first_logits, last_logits: the bits of the logits of the first and of the last token.
    """

    prefill_seconds: list[float]
    decode_seconds: list[float]
    tokens: Int[np.ndarray, "batch tokens"]
    first_logits: UInt[np.ndarray, "batch vocab"]
    last_logits: UInt[np.ndarray, "batch vocab"]

    def digests(self) -> dict[str, str]:
        """What to compare the bits by, also of results of other processes."""
        parts = ("tokens", "first_logits", "last_logits")
        return {part: hashlib.sha256(getattr(self, part).tobytes()).hexdigest() for part in parts}


def trace(shapes: Params, config: Config, request: Request) -> RequestPrograms:
    """The programs of a request, for parameters of these shapes."""
    # Of inputs, too: what does not fit is found out without drawing them.
    inputs, step_inputs = jax.eval_shape(lambda: (request.inputs(config), request.step_inputs()))
    first = prefill.trace(shapes, *inputs, request.length, config)
    second = decode.trace(shapes, first.out_info, *step_inputs, request.steps, config)
    return RequestPrograms(first, second)


def compile_request(shapes: Params, config: Config, request: Request) -> RequestPrograms:
    """The programs of a request, compiled side by side for where the parameters are to be."""
    traced = trace(shapes, config, request)
    with ThreadPoolExecutor(len(traced)) as pool:
        return RequestPrograms(*pool.map(lambda program: program.lower().compile(), traced))


def run(
    programs: RequestPrograms,
    params: Params,
    config: Config,
    request: Request,
    repeats: int,
    most_seconds: float = math.inf,
) -> Result:
    """Runs compiled programs once to warm up, then by the clock.

    Args:
        programs: the programs.
        params: the parameters, where the programs were compiled for.
        config: the configuration of the transformer.
        request: the request that the programs are of.
        repeats: how often to run them by the clock.
        most_seconds: once they have run for so many seconds, they are not run again.
    """
    inputs, step_inputs = request.inputs(config), request.step_inputs()
    prefill_seconds: list[float] = []
    decode_seconds: list[float] = []
    while len(prefill_seconds) < 2 or (
        len(prefill_seconds) <= repeats
        and sum(prefill_seconds[1:] + decode_seconds[1:]) < most_seconds
    ):
        start = time.perf_counter()
        state = jax.block_until_ready(programs.prefill(params, *inputs))
        prefill_seconds.append(time.perf_counter() - start)
        # Copies, because the token loop uses the state up.
        first, first_logits = np.array(state.tokens), np.array(state.logits)
        start = time.perf_counter()
        state, rest = jax.block_until_ready(programs.decode(params, state, *step_inputs))
        decode_seconds.append(time.perf_counter() - start)
        last_logits = np.array(state.logits)
        # Its cache would take memory while the next one is made, which no plan knows of.
        del state
    return Result(
        prefill_seconds[1:],
        decode_seconds[1:],
        np.concatenate([first[:, None], rest], axis=1),
        first_logits.view(np.uint32),
        last_logits.view(np.uint32),
    )


@jax.jit
def decompress_as_a_step(params: Params, tokens: Int[Array, " batch"]) -> Array:
    """Decompresses all that a step of the token loop does, in the same order, and nothing else.

    Returns:
        A sum of some weights, so that XLA drops nothing.
    """

    def add(carry: Array, block: Params, _: None) -> tuple[Array, None]:
        # Of each weight one element: reading more would be time that is not the decoder's.
        picked = [leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(block)]
        return sum(picked, carry), None

    carry = tables.look_up(params["embed_tokens"], tokens).astype(jnp.float32).sum()
    carry, _ = scan_blocks(add, carry, params["layers"])
    head = params["lm_head" if "lm_head" in params else "embed_tokens"]
    return scan_pieces(
        tables.first_slice(head),
        carry,
        lambda carry, first, piece: carry + piece[0, 0].astype(jnp.float32),
    )
