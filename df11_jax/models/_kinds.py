"""The kinds of layers: full ones, and those with a sliding window; and in what order they are."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import jax
from jaxtyping import Array, Int

from df11_jax.models._config import Config

Kind = Literal["full", "sliding"]
Carry = TypeVar("Carry")
Number = Int[Array, ""] | int


def layer_kinds(config: Config) -> tuple[Kind, ...]:
    """The kind of each layer."""
    return tuple("sliding" if sliding else "full" for sliding in config.sliding)


def fold_runs(
    function: Callable[[Carry, Kind, Number, int], Carry],
    carry: Carry,
    kinds: Sequence[Kind],
    before: Sequence[Kind] = (),
) -> Carry:
    """Calls a function for each run of layers of one kind, in their order.

    Where kinds come in a pattern again and again, it is in a loop: programs have the runs of one
    pattern, and of what is left at the end, however many layers there are.

    Args:
        function: `function(carry, kind, number, count) -> carry`, for a run of `count` layers;
            `number` is that of the first one among all layers of its kind.
        carry: what the first call gets.
        kinds: of the layers.
        before: of the layers before these.

    Returns:
        The last carry.
    """

    def fold(carry: Carry, kinds: Sequence[Kind], numbers: Mapping[Kind, Number]) -> Carry:
        done: Counter[Kind] = Counter()
        for kind, run in itertools.groupby(kinds):
            count = len(list(run))
            carry = function(carry, kind, numbers[kind] + done[kind], count)
            done[kind] += count
        return carry

    pattern = kinds[: _period(kinds)]
    times, in_loop = len(kinds) // max(1, len(pattern)), 0
    if times > 1:
        first, each = Counter(before), Counter(pattern)

        def fold_pattern(i: Array, carry: Carry) -> Carry:
            return fold(carry, pattern, {kind: first[kind] + i * each[kind] for kind in each})

        carry = jax.lax.fori_loop(0, times, fold_pattern, carry)
        in_loop = times * len(pattern)
    return fold(carry, kinds[in_loop:], Counter([*before, *kinds[:in_loop]]))


def _period(kinds: Sequence[Kind]) -> int:
    """After how many layers kinds repeat themselves; those of a single run do not."""
    if len(set(kinds)) < 2:
        return len(kinds)
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
