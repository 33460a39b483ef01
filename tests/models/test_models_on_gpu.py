"""Text models of every kind on a GPU: `pytest -m gpu`."""

import dataclasses

import families
import jax
import numpy as np
import pytest
import runs

ROW = list(range(20))  # few enough tokens for fused products


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device that JAX sees")
@pytest.mark.parametrize("family", families.KINDS)
def test_generation(family):
    compressed, config = runs.load(family)
    plain, _ = runs.load(family, compress=False)
    runs.assert_same_bits(runs.run(compressed, config), runs.run(plain, config))

    # Fused products add in another order than XLA's.
    (exact,) = runs.all_logits(compressed, config, [ROW])
    (fused,) = runs.all_logits(compressed, dataclasses.replace(config, exact=False), [ROW])
    np.testing.assert_allclose(fused, exact, rtol=0, atol=0.1 * np.std(exact))
