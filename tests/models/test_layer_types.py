"""Runs of layers of one type: all layers are there, in their order, in a program that is short."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_configs import KNOWN

from df11_jax import models
from df11_jax.models import _layer_types

ORDERS = ["", "f", "s", "ffff", "sf", "sfs", "sfsfsf", "ssfssfss", "fssffs", "sssssf" * 2 + "ss"]
NAMES = {"f": "full", "s": "sliding"}


def visit(types, before):
    """(whether it is sliding, number among its type) of each layer, and how many runs there are."""
    runs = []

    def run(carry, type_, number, count):
        runs.append(count)
        layers, at = carry
        new = jnp.stack([jnp.full(count, type_ == "sliding"), number + jnp.arange(count)], axis=1)
        return jax.lax.dynamic_update_slice(layers, new, (at, 0)), at + count

    layers = jnp.full((len(types), 2), -1), jnp.int32(0)
    return np.asarray(_layer_types.fold_runs(run, layers, types, before)[0]).tolist(), len(runs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", ["", "ssf"])
def test_every_layer_comes_once_and_in_order(order, before):
    types = [NAMES[letter] for letter in before + order]
    expected = [[type_ == "sliding", types[:i].count(type_)] for i, type_ in enumerate(types)]
    layers, _ = visit(types[len(before) :], types[: len(before)])
    assert layers == expected[len(before) :]


# Gemma's patterns of six, and what is left at the end.
@pytest.mark.parametrize(
    ("name", "runs"),
    [("Llama-3.1-70B", 1), ("gemma-3-270m", 2), ("gemma-3-12b", 2), ("gemma-3-27b", 3)],
)
def test_programs_have_each_run_of_a_pattern_once(name, runs):
    types = _layer_types.layer_types(models.read_config(KNOWN[name]))
    layers, count = visit(types, ())
    assert len(layers) == len(types)
    assert count == runs
