"""Runs of layers of one kind: all layers are there, in their order, in a program that is short."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_configs import KNOWN

from df11_jax import models
from df11_jax.models import _kinds

ORDERS = ["", "f", "s", "ffff", "sf", "sfs", "sfsfsf", "ssfssfss", "fssffs", "sssssf" * 2 + "ss"]
NAMES = {"f": "full", "s": "sliding"}


def visit(kinds, before):
    """(whether it is sliding, number among its kind) of each layer, and how many runs there are."""
    runs = []

    def run(carry, kind, number, count):
        runs.append(count)
        layers, at = carry
        new = jnp.stack([jnp.full(count, kind == "sliding"), number + jnp.arange(count)], axis=1)
        return jax.lax.dynamic_update_slice(layers, new, (at, 0)), at + count

    layers = jnp.full((len(kinds), 2), -1), jnp.int32(0)
    return np.asarray(_kinds.fold_runs(run, layers, kinds, before)[0]).tolist(), len(runs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", ["", "ssf"])
def test_every_layer_comes_once_and_in_order(order, before):
    kinds = [NAMES[letter] for letter in before + order]
    expected = [[kind == "sliding", kinds[:i].count(kind)] for i, kind in enumerate(kinds)]
    layers, _ = visit(kinds[len(before) :], kinds[: len(before)])
    assert layers == expected[len(before) :]


# Gemma's patterns of six, and what is left at the end.
@pytest.mark.parametrize(
    ("name", "runs"),
    [("Llama-3.1-70B", 1), ("gemma-3-270m", 2), ("gemma-3-12b", 2), ("gemma-3-27b", 3)],
)
def test_programs_have_each_run_of_a_pattern_once(name, runs):
    kinds = _kinds.layer_kinds(models.read_config(KNOWN[name]))
    layers, count = visit(kinds, ())
    assert len(layers) == len(kinds)
    assert count == runs
