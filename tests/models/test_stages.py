"""Text models whose layers are divided into stages, on devices that are parts of one CPU here."""

import dataclasses
import functools

import families
import jax
import numpy as np
import pytest
from runs import DRAWN, F32, GREEDY, NONE, PROMPTS, assert_same_bits, run

from df11_jax import checkpoints, models
from df11_jax.models import _programs

CONFIGS = {
    "wide": families.CONFIGS["llama-biases"]
    | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
    "mixtral": families.CONFIGS["mixtral"] | {"num_hidden_layers": 2},
    # Each stage has a layer of each type, in stacks of their own.
    "hybrid": families.CONFIGS["qwen3_5_text"]
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "sliding": families.CONFIGS["gemma3_text"]
    | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices"),
]


@functools.cache
def load(name, devices, stages=1, compress=True):
    config = models.read_config(CONFIGS[name])
    source = models.RandomSource(config)
    options = {"compress": compress, "devices": devices, "stages": stages}
    return models.load_params(source, config, **options), dataclasses.replace(config, dtype=F32)


@pytest.mark.fusion_emitters
@pytest.mark.parametrize(
    ("name", "devices", "stages"),
    [("wide", 4, 4), ("mixtral", 2, 2), ("hybrid", 4, 2), ("sliding", 4, 2)],
)
def test_stages_compute_what_their_devices_do_without(name, devices, stages):
    (alone, config), (staged, _) = load(name, devices // stages), load(name, devices, stages)
    (one, (_, expected)), (several, after) = run(alone, config), run(staged, config)
    plain, _ = load(name, devices, stages, compress=False)
    assert_same_bits((several, after), run(plain, config))
    assert_same_bits(several.cache, one.cache)
    np.testing.assert_allclose(several.logits, one.logits, atol=1e-5)
    np.testing.assert_array_equal(after[1], expected)
    if devices > stages:
        return
    for leaf in jax.tree.leaves(staged["layers"]):
        assert {s.data.nbytes * stages for s in leaf.addressable_shards} == {leaf.nbytes}


@pytest.mark.parametrize("name", ["hybrid", "sliding"])
def test_prompts_in_pieces(name, monkeypatch):
    # Each row has pieces before its prompt begins; and a stage begins one while the next works.
    monkeypatch.setattr(_programs, "PIECE_TOKENS", 12)
    (alone, config), (staged, _) = load(name, 2), load(name, 4, 2)
    config = dataclasses.replace(config, exact=True)  # another program than that of other tests
    prompts = [*PROMPTS, list(range(1, 40))]
    assert models.generate(staged, prompts, config, tokens=6, sampling=DRAWN) == models.generate(
        alone, prompts, config, tokens=6, sampling=DRAWN
    )


def test_saved_parameters_fit_any_number_of_stages(tmp_path):
    (alone, config), (staged, _) = load("wide", 2), load("wide", 4, 2)
    checkpoints.save(staged, tmp_path / "params")
    loaded = checkpoints.load(tmp_path / "params")
    for stages in (2, 1):
        if stages == 1:  # stacks are the same; a table is padded for the number of all devices
            loaded = loaded | {"embed_tokens": alone["embed_tokens"]}
        placed = models.place_params(loaded, config, 2 * stages, stages=stages)
        assert models.find_mesh(placed).shape == {"stage": stages, "model": 2}
        assert_same_bits(placed["layers"], (staged if stages == 2 else alone)["layers"])


def test_stages_of_one_device_are_several_devices():
    # Such stages have whole layers; what shows that there are others is the embedding.
    staged, config = load("sliding", 2, 2)
    tokens = np.array([[1, 2]])
    prompt = tokens, np.array([2]), GREEDY, jax.random.split(jax.random.key(0), 1), NONE, 4
    with pytest.raises(ValueError, match=r"divided for 2 devices.* need mesh=models.find_mesh"):
        models.prefill(staged, *prompt, config)
    with pytest.raises(ValueError, match=r"divided for 2 devices.* forward and project take"):
        models.forward(staged, tokens, tokens, 0, models.init_cache(config, 1, 4), config)
    with pytest.raises(ValueError, match=r"divided for 2 devices.* forward and project take"):
        models.project(staged, np.ones((1, config.dim), F32), config)
    alone = jax.device_put(staged, jax.devices()[0])
    with pytest.raises(ValueError, match=r"divided for 2 devices, but on 1: see .*place_params"):
        models.generate(alone, [[1]], config, tokens=2)


@pytest.mark.parametrize(
    ("change", "devices", "stages", "message"),
    [
        ({}, 4, 3, "4 devices cannot be divided into 3 stages"),
        ({}, 4, 0, "4 devices cannot be divided into 0 stages"),
        ({"num_hidden_layers": 3}, 2, 2, "the 3 layers .* into 2 stages .*: expected 1 or 3"),
    ],
)
def test_what_cannot_be_divided(change, devices, stages, message):
    config = models.read_config(CONFIGS["wide"] | change)
    source = models.RandomSource(config)
    with pytest.raises(ValueError, match=message):
        models.load_params(source, config, devices=devices, stages=stages)
