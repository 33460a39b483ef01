"""Text models of every kind on a GPU: `pytest -m gpu`."""

import dataclasses

import families
import jax
import numpy as np
import pytest
import runs

from df11_jax import _ffi


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device that JAX sees")
@pytest.mark.parametrize("family", families.KINDS)
def test_generation(family):
    compressed, config = runs.load(family)
    plain, _ = runs.load(family, compress=False)
    runs.assert_same_bits(runs.run(compressed, config), runs.run(plain, config))

    # Fused products add in another order than XLA's. The experts of a single token are fused.
    fusing = dataclasses.replace(config, exact=False)
    decode = runs.begin(compressed, fusing)
    lowered = decode.func.trace(*decode.args).lower(lowering_platforms=("cuda",))
    assert _ffi.PRODUCT_TARGET in lowered.as_text()
    for tokens in ([5], list(range(20))):
        (exact,) = runs.all_logits(compressed, config, [tokens])
        (fused,) = runs.all_logits(compressed, fusing, [tokens])
        np.testing.assert_allclose(fused, exact, rtol=0, atol=0.1 * np.std(exact))
