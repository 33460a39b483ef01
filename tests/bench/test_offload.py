"""The last layers in host memory: the same bits, however many they are."""

import families
import jax
import numpy as np
import pytest

from df11_jax import models
from df11_jax.bench.placements import PlacedWeights, offload
from df11_jax.bench.request import Request, compile_request, run

pytestmark = pytest.mark.slow


# Of Gemma's 7 layers, all but the sixth have sliding windows: each part has some of both kinds.
@pytest.mark.parametrize(("family", "count"), [("llama", 1), ("qwen2", 3), ("gemma3_text", 3)])
def test_offloaded_layers_compute_the_same(family, count):
    device, request = jax.devices()[0], Request(batch=2, prompt=11, tokens=3)
    config = models.read_config(families.CONFIGS[family])
    plain = models.load_params(families.source_of(family), config, compress=False)
    plain = jax.tree.map(np.asarray, plain)
    results = []
    for params in (plain, offload(plain, count)):
        weights = PlacedWeights("any", params)
        programs = compile_request(weights.shapes(device), config, request)
        placed = weights.put(device)
        results.append(run(programs, placed, config, request, repeats=1))
    assert results[1].digests() == results[0].digests()
    assert weights.host_layers == count
    assert {x.sharding.memory_kind for x in jax.tree.leaves(placed["host_layers"])} == {
        "pinned_host"
    }
