"""Runs of layers of one type: all layers are there, in their order, in a program that is short."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_configs import KNOWN

from df11_jax import models
from df11_jax.models import _layer_types

ORDERS = ["", "f", "s", "ffff", "sf", "sfs", "sfsfsf", "ssfssfss", "fssffs", "sssssf" * 2 + "ss"]
ORDERS += ["ssfssf" + "tgtgt", "lllf" * 2 + "l"]
NAMES = {
    "f": "full",
    "s": "sliding",
    "l": "linear",
    "g": "shared_full",
    "t": "shared_sliding",
}


def visit(types, before):
    """(letter of its type, number among its type) of each layer, and how many runs there are."""
    runs, letters = [], "fslgt"

    def run(carry, type_, number, count):
        runs.append(count)
        layers, at = carry
        letter = next(i for i, letter in enumerate(letters) if NAMES[letter] == type_)
        new = jnp.stack([jnp.full(count, letter), number + jnp.arange(count)], axis=1)
        return jax.lax.dynamic_update_slice(layers, new, (at, 0)), at + count

    layers = jnp.full((len(types), 2), -1), jnp.int32(0)
    found = np.asarray(_layer_types.fold_runs(run, layers, types, before)[0]).tolist()
    return [[letters[letter], number] for letter, number in found], len(runs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", ["", "ssf"])
def test_every_layer_comes_once_and_in_order(order, before):
    letters = before + order
    types = [NAMES[letter] for letter in letters]
    expected = [[letter, letters[:i].count(letter)] for i, letter in enumerate(letters)]
    layers, _ = visit(types[len(before) :], types[: len(before)])
    assert layers == expected[len(before) :]


# Gemma's patterns of six, and what is left at the end; those of layers that share keys.
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("Llama-3.1-70B", 1),
        ("gemma-3-270m", 2),
        ("gemma-3-12b", 2),
        ("gemma-3-27b", 3),
        ("Qwen3.5-27B", 2),
        ("gemma-4-E2B", 4),
    ],
)
def test_programs_have_each_run_of_a_pattern_once(name, runs):
    types = _layer_types.layer_types(models.read_config(KNOWN[name]))
    layers, count = visit(types, ())
    assert len(layers) == len(types)
    assert count == runs
