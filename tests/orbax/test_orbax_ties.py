"""Tied leaves, compressed as they are saved: once."""

import jax
import numpy as np
import pytest
from orbax_helpers import assert_same_tree, restore, save
from payloads import random_weights

from df11_jax._identity import identity
from df11_jax.orbax._save import to_orbax


@pytest.mark.parametrize("placed", [False, True], ids=["numpy", "placed"])
def test_saved(placed, tmp_path):
    weights = random_weights((4, 128, 128))
    if not placed:
        weights = np.array(weights)
    params = {"embedding": weights, "layers": [weights, weights], "plain": weights}
    if placed:
        params = jax.device_put(params, jax.devices()[0])
    options = {"stacked": "^layers/", "include": "embedding|layers"}
    stored, _ = to_orbax(params, options, None)
    for part in ("exponents", "sign_mantissa"):
        first, second = (layer[part] for layer in stored["layers"])
        assert identity(first) == identity(second) != identity(stored["embedding"][part])
    assert stored["plain"] is params["plain"]

    save(tmp_path / "x", params, compress=options)
    restored = restore(tmp_path / "x")
    assert [layer.stack_shape for layer in restored["layers"]] == [(4,), (4,)]
    assert restored["embedding"].stack_shape == ()
    assert_same_tree(restore(tmp_path / "x", decompress=True), params)
