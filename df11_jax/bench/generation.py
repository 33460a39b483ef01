"""A generation to measure: its two programs, and what comes of running them."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from df11_jax._scan import scan_blocks
from df11_jax.models import Config, Params, Sampling, decode, prefill, tables
from df11_jax.models.prompts import BUCKET

STEP = BUCKET  # caches are multiples of it, as those that `generate` makes


@dataclasses.dataclass(frozen=True)
class Job:
    """What is generated: the likeliest tokens after random prompts, none of which ends early.

    Attributes:
        batch: how many prompts.
        prompt: tokens of each.
        tokens: to choose for each, at least 2: the first by the program that reads the prompts.
    """

    batch: int
    prompt: int
    tokens: int

    @property
    def steps(self) -> int:
        """Of the token loop."""
        return self.tokens - 1

    @property
    def length(self) -> int:
        """Of the cache. The token chosen last is not read any more."""
        return -(-(self.prompt + self.steps) // STEP) * STEP

    def inputs(self, config: Config) -> tuple[Any, ...]:
        """What `prefill` takes beside the parameters."""
        key, shape = jax.random.key(self.batch), (self.batch, self.prompt)
        prompts = jax.random.randint(key, shape, 0, config.vocab, jnp.int32)
        lengths = jnp.full(self.batch, self.prompt, jnp.int32)
        return prompts, lengths, *self._rest()

    def step_inputs(self) -> tuple[Any, ...]:
        """What `decode` takes beside parameters and state."""
        return jnp.int32(self.steps), *self._rest()

    def _rest(self) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), self.batch)
        return Sampling(), keys, jnp.zeros(0, jnp.int32)


class Programs(NamedTuple):
    """The programs of a job: traced, or compiled."""

    prefill: Any
    decode: Any


class Result(NamedTuple):
    """What came of a job, and how long it took.

    Attributes:
        prefill_seconds: each time.
        decode_seconds: each time, of all steps of the token loop.
        tokens: all that were chosen.
        first_logits, last_logits: their bits, for the first and for the last token.
    """

    prefill_seconds: list[float]
    decode_seconds: list[float]
    tokens: Int[np.ndarray, "batch tokens"]
    first_logits: UInt[np.ndarray, "batch vocab"]
    last_logits: UInt[np.ndarray, "batch vocab"]

    def differences(self, other: "Result") -> list[str]:
        """In what it differs from another, bit by bit."""
        kinds = ("tokens", "first_logits", "last_logits")
        return [
            kind.replace("_", " ")
            for kind in kinds
            if not np.array_equal(getattr(self, kind), getattr(other, kind))
        ]


def trace(shapes: Params, config: Config, job: Job) -> Programs:
    """The programs of a job, for parameters of these shapes."""
    # Of inputs, too: what does not fit is found out without drawing them.
    inputs, step_inputs = jax.eval_shape(lambda: (job.inputs(config), job.step_inputs()))
    first = prefill.trace(shapes, *inputs, job.length, config)
    return Programs(first, decode.trace(shapes, first.out_info, *step_inputs, job.steps, config))


def compile_job(shapes: Params, config: Config, job: Job) -> Programs:
    """The same, compiled for where the parameters are to be."""
    return Programs(*(traced.lower().compile() for traced in trace(shapes, config, job)))


def run(programs: Programs, params: Params, config: Config, job: Job, repeats: int) -> Result:
    """Runs compiled programs once to warm up, then so many times by the clock."""
    inputs, step_inputs = job.inputs(config), job.step_inputs()
    prefill_seconds, decode_seconds = [], []
    for _ in range(1 + repeats):
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
    return tables.scan_pieces(
        head, carry, lambda carry, first, piece: carry + piece[0, 0].astype(jnp.float32)
    )
