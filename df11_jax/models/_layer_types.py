"""The types of layers, how they differ, and the order in which they come."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import jax
from jaxtyping import Array, Int

from df11_jax.models._config import Config

# Full attention, sliding windows, a recurrent state, and attention to another layer's keys.
LayerType = Literal["full", "sliding", "linear", "shared_full", "shared_sliding"]
Carry = TypeVar("Carry")
Number = Int[Array, ""] | int


def layer_types(config: Config) -> tuple[LayerType, ...]:
    """The type of each layer."""

    def type_of(layer: int) -> LayerType:
        if config.delta_rule is not None and config.delta_rule.layers[layer]:
            return "linear"
        if layer < config.layers - config.shared_layers:
            return "sliding" if config.sliding[layer] else "full"
        return "shared_sliding" if config.sliding[layer] else "shared_full"

    return tuple(type_of(layer) for layer in range(config.layers))


def type_config(config: Config, type_: LayerType) -> Config:
    """The configuration of the layers of one type."""
    if config.full is not None and type_ in ("full", "shared_full"):
        config = dataclasses.replace(config, **dataclasses.asdict(config.full))
    if type_ in ("shared_full", "shared_sliding"):
        config = dataclasses.replace(config, hidden=config.shared_hidden, shares_keys=True)
    return config


def count_stack(path: Sequence[str], config: Config) -> int:
    """The number of layers in the stack that the leaf at a path, below "layers", belongs to."""
    if not config.layers_differ:
        return config.layers
    return sum(type_ == path[1] for type_ in layer_types(config))


def fold_runs(
    function: Callable[[Carry, LayerType, Number, int], Carry],
    carry: Carry,
    types: Sequence[LayerType],
    before: Sequence[LayerType] = (),
) -> Carry:
    """Calls a function for each run of layers of one type, in their order.

    Where the types repeat a pattern, the calls for one pattern are in a loop, and so on with the
    types that come after it. A program then contains the runs of each pattern once, and those that
    are left at the end, however many layers there are.

    Args:
        function: `function(carry, type, number, count) -> carry`, for a run of `count` layers;
            `number` is the index of its first layer among all layers of this type.
        carry: the carry that the first call gets.
        types: the types of the layers.
        before: the types of the layers that come before these.

    Returns:
        The last carry.
    """

    def fold(
        carry: Carry, types: Sequence[LayerType], numbers: Mapping[LayerType, Number]
    ) -> Carry:
        done: Counter[LayerType] = Counter()
        for type_, run in itertools.groupby(types):
            count = len(list(run))
            carry = function(carry, type_, numbers[type_] + done[type_], count)
            done[type_] += count
        return carry

    size, times = _find_pattern(types)
    if times == 1:
        return fold(carry, types, Counter(before))
    pattern, rest = types[:size], types[size * times :]
    first, each = Counter(before), Counter(pattern)

    def fold_pattern(i: Array, carry: Carry) -> Carry:
        return fold(carry, pattern, {type_: first[type_] + i * each[type_] for type_ in each})

    carry = jax.lax.fori_loop(0, times, fold_pattern, carry)
    return fold_runs(function, carry, rest, [*before, *types[: size * times]])


def _find_pattern(types: Sequence[LayerType]) -> tuple[int, int]:
    """The number of layers in the pattern that most of the types begin with, and its repetitions.

    A run of a single type is no pattern.
    """
    best = len(types), 1
    covered = 0
    for size in range(2, len(types) // 2 + 1):
        pattern, times = types[:size], 1
        while types[times * size : (times + 1) * size] == pattern:
            times += 1
        if times > 1 and len(set(pattern)) > 1 and size * times > covered:
            best, covered = (size, times), size * times
    return best
