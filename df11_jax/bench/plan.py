"""The memory that a generation takes, as XLA plans it, and the longest one that fits."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from df11_jax.bench.placements import PlacedWeights
from df11_jax.bench.request import STEP, Request, RequestPrograms


class Plan(NamedTuple):
    """Bytes of device memory during a generation, weights and cache included.

    Attributes:
        prefill: the bytes while the prompts are read.
        decode: the bytes in the token loop.
    """

    prefill: int
    decode: int

    @property
    def peak(self) -> int:
        """The larger one."""
        return max(self)


def read_plan(programs: RequestPrograms, weights: PlacedWeights) -> Plan:
    """The plan that XLA has made.

    Args:
        programs: the compiled programs.
        weights: the weights that they take.
    """
    prefill, decode = (program.memory_analysis() for program in programs)
    return make_plan(prefill, decode, weights)


def make_plan(prefill: Any, decode: Any, weights: PlacedWeights) -> Plan:
    """The plan in what `memory_analysis` returns for each program."""
    return Plan(_device_bytes(prefill, weights), _device_bytes(decode, weights))


def _device_bytes(stats: Any, weights: PlacedWeights) -> int:
    arguments = stats.argument_size_in_bytes
    if not stats.host_argument_size_in_bytes:
        # A CPU does not tell host memory from the device's.
        arguments -= weights.host_bytes
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return arguments + results + stats.temp_size_in_bytes


def request_of_length(length: int) -> Request:
    """A request whose context has `length` tokens: all but the last one are the prompt."""
    return Request(batch=1, prompt=length - 1, tokens=2)


def find_longest(peak: Callable[[int], int], budget: int, most: int) -> int:
    """The longest context that fits.

    Nothing is extrapolated: what is returned was asked for and fits, and `STEP` more tokens, or
    `most`, were asked for and do not.

    Args:
        peak: a function of a context's length, expensive to call; returns the bytes that it takes.
        budget: the bytes that there are.
        most: the longest context to ask for.

    Returns:
        `most` if that fits, else a multiple of `STEP`, 0 if nothing fits.
    """
    if (fails_bytes := peak(most)) <= budget:
        return most
    # In steps; the last one may be shorter.
    fits, fails = 1, -(-most // STEP)
    if fails == 1 or (fits_bytes := peak(STEP * fits)) > budget:
        return 0
    asked = 0
    while fails - fits > 1:
        # It is almost linear, so that the first guess is right and its neighbour proves it. Were it
        # not, guesses in the middle would bound the number of guesses.
        share = (budget - fits_bytes) / (fails_bytes - fits_bytes) if asked % 3 < 2 else 0.5
        guess = min(max(fits + math.floor(share * (fails - fits)), fits + 1), fails - 1)
        guess_bytes = peak(STEP * guess)
        if guess_bytes <= budget:
            fits, fits_bytes = guess, guess_bytes
        else:
            fails, fails_bytes = guess, guess_bytes
        asked += 1
    return STEP * fits
