"""Estimates of memory: against counts that are known, real compression, and XLA's plans."""

import collections
import dataclasses
import pathlib

import families
import pytest
import shapes
from known_configs import KNOWN

from df11_jax import models, size_report
from df11_jax._files.source import TensorInfo
from df11_jax.models import estimate, fit
from df11_jax.models._layer_types import layer_types

# As the models' cards have them; of Gemma, without what it sees with.
PARAMETERS = [
    ("Llama-3.1-8B", 8_030_261_248),
    ("Llama-3.1-70B", 70_553_706_496),
    ("Llama-3.2-1B", 1_235_814_400),
    ("Qwen2.5-7B", 7_615_616_512),
    ("Qwen3-14B", 14_768_307_200),
    ("Qwen3-30B-A3B", 30_532_122_624),
    ("Mixtral-8x7B", 46_702_792_704),
    ("Mistral-7B-v0.1", 7_241_732_096),
    ("Phi-3-mini-4k", 3_821_079_552),
    ("gemma-3-27b", 27_009_346_304),
    ("Qwen3.5-27B", 26_895_998_464),
    ("Qwen3.5-35B-A3B", 34_660_610_688),
    ("gemma-4-31B", 30_697_345_340),
    ("gemma-4-E2B", 4_628_569_379),
]


@pytest.mark.parametrize(("name", "count"), PARAMETERS)
def test_parameters_are_as_many_as_the_models_have(name, count):
    config = models.read_config(KNOWN[name])
    assert estimate.count_parameters(config) == count
    weights = estimate.estimate_weights(config)
    # Tables are filled up to whole groups of rows.
    assert 2 * count <= weights.plain <= 2 * count * 1.001
    assert weights.least < weights.compressed < weights.most
    assert 10.6 < 8 * weights.least / count
    assert 8 * weights.most / count < 10.9


def cache_bytes(config, slots):
    """Of one sequence: keys and values of each layer, and positions for each kind of layers."""
    nbytes, rule = 0, config.delta_rule
    for type_, layers in collections.Counter(layer_types(config)).items():
        if type_ == "linear":
            matrix = 4 * rule.value_heads * rule.key_dim * rule.value_dim
            channels = 2 * rule.key_heads * rule.key_dim + rule.value_heads * rule.value_dim
            nbytes += layers * (matrix + 2 * (rule.taps - 1) * channels)
        elif not type_.startswith("shared"):
            heads = config.full if config.full and type_ == "full" else config
            count = slots if type_ == "full" else min(slots, config.window)
            nbytes += count * (layers * 2 * 2 * heads.kv_heads * heads.head_dim + 4)
    return nbytes


@pytest.mark.parametrize(
    ("name", "context"),
    [("gemma-3-1b", 500), ("gemma-3-1b", 513), ("gemma-3-4b", 131_072), ("gemma-3-27b", 32_768)],
)
def test_sliding_layers_take_no_more_than_their_window(name, context):
    config = models.read_config(KNOWN[name])
    memory = models.estimate_memory(config, batch=5, context=context)
    slots = -(-context // 64) * 64
    assert memory.cache == 5 * cache_bytes(config, slots)


def test_documentation_has_the_caches_that_models_take():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
    names = ("gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b", "Llama-3.1-8B")
    for name in names:
        config = models.read_config(KNOWN[name])
        contexts = [n for n in (8192, 32_768, 131_072) if n <= config.max_length]
        full = dataclasses.replace(config, sliding=(False,) * config.layers)
        kept, all_ = (
            [f"{estimate.cache_nbytes(c, 1, context) / 1e9:.2f}" for context in contexts]
            for c in (config, full)
        )
        cells = [name, *kept, *[""] * (3 - len(kept)), ", ".join(all_)]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in page


@pytest.mark.parametrize(
    "name",
    [
        *("Llama-3.1-8B", "Llama-3.2-1B", "Qwen2.5-7B", "Phi-4-mini", "GLM-4-9B-0414"),
        *("gemma-3-27b", "Qwen3.5-27B", "Qwen3.5-35B-A3B", "gemma-4-31B", "gemma-4-E4B"),
    ],
)
def test_weights_and_cache_are_those_of_the_shapes(name):
    config = models.read_config(KNOWN[name])
    # These have the exponents of normally distributed weights.
    report = size_report(shapes.param_shapes(config, compress=True))
    estimate = models.estimate_memory(config, batch=3, context=1000)
    assert estimate.plain_weights == report.nbytes_before
    assert report.nbytes < estimate.weights < 1.01 * report.nbytes
    plain = models.estimate_memory(config, batch=3, context=1000, compress=False)
    assert plain.weights == plain.plain_weights == report.nbytes_before
    # 1,000 tokens take 1,024 slots.
    assert estimate.cache == plain.cache == 3 * cache_bytes(config, 1024)


def test_estimate_holds_for_compressed_weights():
    config = models.read_config(
        families.CONFIGS["qwen3"]
        | {"vocab_size": 3000, "hidden_size": 512, "intermediate_size": 1536}
    )
    params = models.load_params(models.RandomSource(config), config)
    report = size_report(params)
    weights = estimate.estimate_weights(config)
    assert weights.plain == report.nbytes_before
    # Codebooks and padding count in a model as small as this.
    assert weights.least <= report.nbytes * 1.01
    assert report.nbytes <= weights.most * 1.01


@pytest.mark.parametrize("family", families.KINDS)
def test_cache_is_that_of_the_programs(family):
    config = models.read_config(families.CONFIGS[family])
    params = shapes.param_shapes(config, compress=False)
    programs = models.compile_programs(params, config, batch=2, prompt=40, tokens=30)
    assert models.estimate_memory(config, batch=2, context=69).cache == programs.cache_bytes


# XLA's plans for an H100, in MB: with compressed weights, at the worst moment beside weights and
# cache. benchmarks/compile_models_for_gpu.py compiles some of them again.
PLANS = [
    ("Llama-3.1-8B", 1, 2048, 536),
    ("Llama-3.1-8B", 1, 8192, 572),
    ("Llama-3.1-8B", 1, 32768, 623),
    ("Llama-3.1-8B", 8, 2048, 605),
    ("Llama-3.1-8B", 8, 8192, 613),
    ("Llama-3.1-8B", 8, 32768, 612),
    ("Llama-3.1-8B", 64, 8192, 524),
    ("Llama-3.2-1B", 1, 2048, 231),
    ("Llama-3.2-1B", 8, 8192, 311),
    ("Qwen2.5-7B", 1, 2048, 574),
    ("Qwen2.5-7B", 8, 8192, 659),
    ("Qwen3-14B", 1, 2048, 749),
    ("Qwen3-14B", 1, 32768, 838),
    ("Qwen3-14B", 8, 2048, 813),
    ("Qwen3-14B", 8, 32768, 820),
    ("gemma-3-4b", 1, 2048, 307),
    ("gemma-3-4b", 8, 8192, 363),
    ("gemma-3-12b", 1, 32768, 614),
    ("gemma-3-27b", 1, 2048, 948),
    ("gemma-3-27b", 1, 8192, 964),
    ("gemma-3-27b", 1, 32768, 973),
    ("gemma-3-27b", 1, 131_072, 973),
    ("gemma-3-27b", 8, 32768, 970),
    ("Qwen3.5-27B", 1, 2048, 883),
    ("Qwen3.5-27B", 1, 32000, 927),
    ("Qwen3.5-27B", 8, 2048, 944),
    ("Qwen3.5-27B", 64, 5000, 1274),
    ("Qwen3.5-35B-A3B", 1, 2048, 482),
    ("Qwen3.5-35B-A3B", 8, 2048, 597),
    ("gemma-4-31B", 1, 2048, 1130),
    ("gemma-4-31B", 1, 32000, 1233),
    ("gemma-4-E2B", 1, 2048, 258),
    ("gemma-4-E4B", 8, 2048, 468),
]


@pytest.mark.parametrize(("name", "batch", "context", "megabytes"), PLANS)
def test_totals_are_those_of_xlas_plans_or_little_more(name, batch, context, megabytes):
    memory = models.estimate_memory(models.read_config(KNOWN[name]), batch=batch, context=context)
    plan = memory.weights + memory.cache + 1e6 * megabytes
    assert plan <= memory.peak <= 1.02 * plan


# The same for each of several H100s.
PLANS_OF_SEVERAL = [
    ("Llama-3.1-70B", 2, 1, 2048, 910),
    ("Llama-3.1-70B", 4, 1, 2048, 514),
    ("Llama-3.1-70B", 8, 1, 2048, 321),
    ("Llama-3.1-70B", 2, 8, 8000, 1022),
    ("Llama-3.1-8B", 8, 8, 8000, 201),
    ("gemma-3-27b", 2, 1, 8000, 542),
    ("gemma-3-27b", 4, 8, 8000, 389),
    ("Qwen3-14B", 4, 8, 2048, 282),
    ("Qwen2.5-7B", 2, 1, 2048, 322),
    ("Qwen3-30B-A3B", 4, 8, 1088, 752),
    ("Qwen3.5-35B-A3B", 2, 8, 1088, 756),
]


@pytest.mark.parametrize(("name", "devices", "batch", "context", "megabytes"), PLANS_OF_SEVERAL)
def test_totals_of_several_devices_are_those_of_xlas_plans(
    name, devices, batch, context, megabytes
):
    config = models.read_config(KNOWN[name])
    memory = models.estimate_memory(config, batch=batch, context=context, devices=devices)
    plan = memory.weights + memory.cache + 1e6 * megabytes
    assert plan <= memory.peak <= 1.02 * plan


# With stages.
PLANS_OF_STAGES = [
    ("Llama-3.1-405B", 8, 2, 1671),
    ("Llama-3.1-70B", 4, 2, 911),
    ("Llama-3.1-70B", 8, 2, 515),
]


@pytest.mark.parametrize(("name", "devices", "stages", "megabytes"), PLANS_OF_STAGES)
def test_totals_with_stages_are_those_of_xlas_plans(name, devices, stages, megabytes):
    config = models.read_config(KNOWN[name])
    divided = {"devices": devices, "stages": stages}
    memory = models.estimate_memory(config, batch=1, context=2048, **divided)
    plan = memory.weights + memory.cache + 1e6 * megabytes
    assert plan <= memory.peak <= 1.02 * plan


@pytest.mark.parametrize(("name", "devices"), [("Llama-3.1-70B", 8), ("gemma-3-27b", 4)])
def test_weights_and_cache_of_each_device_are_those_of_the_shapes(name, devices):
    config = models.read_config(KNOWN[name])
    whole = models.estimate_memory(config, batch=4, context=4096)
    each = models.estimate_memory(config, batch=4, context=4096, devices=devices)
    # Norms and positions are on all devices.
    for field in ("weights", "plain_weights", "cache"):
        assert (
            getattr(whole, field) < devices * getattr(each, field) < 1.002 * getattr(whole, field)
        )
    weights = estimate.estimate_weights(config)
    assert estimate.shard_weights(config, weights, devices).plain == each.plain_weights
    assert estimate.shard_weights(config, weights, 1) == weights


@pytest.mark.parametrize("compress", [True, False])
def test_more_never_takes_less(compress):
    config = models.read_config(KNOWN["Llama-3.2-1B"])
    for batches, contexts in (([1, 2, 3, 8, 100, 5000], [512]), ([1], range(64, 9000, 500))):
        peaks = [
            models.estimate_memory(config, batch=batch, context=context, compress=compress).peak
            for batch in batches
            for context in contexts
        ]
        assert peaks == sorted(peaks)


def test_largest_that_fits():
    config = models.read_config(KNOWN["Llama-3.1-8B"])
    for limit in (0, 1, 2, 63, 64, 1000, 131_071, 131_072, 10**6):
        assert fit.longest_context(config, lambda n, most=limit: n <= most) == min(limit, 131_072)
        assert fit.largest_batch(lambda n, most=limit: n <= most) == limit
    assert fit.largest_batch(lambda n: True) == fit.MOST_SEQUENCES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"context": 0}, "context is 0"),
        ({"devices": 0}, "devices is 0"),
        ({"devices": 3}, "8 key-value heads .* among 3 devices: expected 1 or 2 or 4 or 8"),
        ({"stages": 0}, "stages is 0"),
        ({"devices": 3, "stages": 2}, "3 devices cannot be divided into 2 stages"),
        ({"devices": 3, "stages": 3}, "32 layers .* into 3 stages"),
        ({"context": 131_073}, "made for 131072 positions"),
    ],
)
def test_what_cannot_be_asked(sizes, message):
    config = models.read_config(KNOWN["Llama-3.1-8B"])
    with pytest.raises(ValueError, match=message):
        models.estimate_memory(config, **({"batch": 1, "context": 1} | sizes))


def test_single_tensors():
    tensors = [
        ((128, 127), "BF16", 2 * 128 * 127),  # too small
        ((128, 128), "BF16", 2 * 128 * 128),
        ((128, 128), "F32", 4 * 128 * 128),
        ((), "BF16", 2),
        ((0, 5), "BF16", 0),
        ((1,) * 8 + (1 << 15,), "BF16", 1 << 16),  # too many dimensions
    ]
    small, large, floats, *rest = (
        estimate.estimate_tensors([TensorInfo(*tensor, stored_nbytes=tensor[-1])])
        for tensor in tensors
    )
    for weights in (small, floats, *rest):
        assert weights.exact and weights.compressed == weights.plain
    assert large.least < large.compressed < large.most < large.plain
    assert estimate.sum_weights([small, large]).plain == small.plain + large.plain
    assert estimate.estimate_tensors([]) == (0, 0, 0, 0)
