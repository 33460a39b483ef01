"""Estimates of memory: against counts that are known, real compression, and XLA's plans."""

import families
import pytest
import shapes

from df11_jax import models, size_report
from df11_jax.models import _fit

LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
LLAMA_3_1_70B = LLAMA_3_1_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN_2_5_7B = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
QWEN_3_14B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
GEMMA_3_27B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
    },
}
# As the models' cards have them; of Gemma, without what it sees with.
PARAMETERS = [
    (LLAMA_3_1_8B, 8_030_261_248),
    (LLAMA_3_1_70B, 70_553_706_496),
    (LLAMA_3_2_1B, 1_235_814_400),
    (QWEN_2_5_7B, 7_615_616_512),
    (QWEN_3_14B, 14_768_307_200),
    (GEMMA_3_27B, 27_009_346_304),
]


@pytest.mark.parametrize(("fields", "count"), PARAMETERS)
def test_parameters_are_as_many_as_the_models_have(fields, count):
    config = models.read_config(fields)
    assert _fit.count_parameters(config) == count
    weights = _fit.estimate_weights(config)
    # Tables are filled up to whole groups of rows.
    assert 2 * count <= weights.plain <= 2 * count * 1.001
    assert weights.least < weights.compressed < weights.most
    assert 10.6 < 8 * weights.least / count
    assert 8 * weights.most / count < 10.9


@pytest.mark.parametrize("fields", [LLAMA_3_1_8B, LLAMA_3_2_1B, QWEN_2_5_7B, GEMMA_3_27B])
def test_weights_and_cache_are_those_of_the_shapes(fields):
    config = models.read_config(fields)
    # These have the exponents of normally distributed weights.
    report = size_report(shapes.param_shapes(config, compress=True))
    estimate = models.estimate_memory(config, batch=3, context=1000)
    assert estimate.plain_weights == report.nbytes_before
    assert report.nbytes < estimate.weights < 1.01 * report.nbytes
    plain = models.estimate_memory(config, batch=3, context=1000, compress=False)
    assert plain.weights == plain.plain_weights == report.nbytes_before
    # 1,000 tokens take 1,024 slots.
    slots = 3 * 1024
    heads = config.layers * config.kv_heads * config.head_dim
    assert estimate.cache == plain.cache == slots * (2 * 2 * heads + 4)


def test_estimate_holds_for_compressed_weights():
    config = models.read_config(
        families.CONFIGS["qwen3"]
        | {"vocab_size": 3000, "hidden_size": 512, "intermediate_size": 1536}
    )
    params = models.load_params(models.RandomSource(config), config)
    report = size_report(params)
    weights = _fit.estimate_weights(config)
    assert weights.plain == report.nbytes_before
    # Codebooks and padding count in a model as small as this.
    assert weights.least <= report.nbytes * 1.01
    assert report.nbytes <= weights.most * 1.01


@pytest.mark.parametrize("family", families.CONFIGS)
def test_cache_is_that_of_the_programs(family):
    config = models.read_config(families.CONFIGS[family])
    params = shapes.param_shapes(config, compress=False)
    programs = models.compile_programs(params, config, batch=2, prompt=40, tokens=30)
    assert models.estimate_memory(config, batch=2, context=69).cache == programs.cache_bytes


# XLA's plans for an H100, in MB: with compressed weights, at the worst moment beside weights and
# cache. tests/cuda/compile_models_for_gpu.py compiles some of them again.
PLANS = [
    (LLAMA_3_1_8B, 1, 2048, 536),
    (LLAMA_3_1_8B, 1, 8192, 572),
    (LLAMA_3_1_8B, 1, 32768, 623),
    (LLAMA_3_1_8B, 8, 2048, 605),
    (LLAMA_3_1_8B, 8, 8192, 613),
    (LLAMA_3_1_8B, 8, 32768, 612),
    (LLAMA_3_1_8B, 64, 8192, 524),
    (LLAMA_3_2_1B, 1, 2048, 231),
    (LLAMA_3_2_1B, 8, 8192, 311),
    (QWEN_2_5_7B, 1, 2048, 574),
    (QWEN_2_5_7B, 8, 8192, 659),
    (QWEN_3_14B, 1, 2048, 749),
    (QWEN_3_14B, 1, 32768, 838),
    (QWEN_3_14B, 8, 2048, 813),
    (QWEN_3_14B, 8, 32768, 820),
    (GEMMA_3_27B, 1, 8192, 963),
    (GEMMA_3_27B, 1, 32768, 973),
    (GEMMA_3_27B, 8, 32768, 970),
]


@pytest.mark.parametrize(("fields", "batch", "context", "megabytes"), PLANS)
def test_totals_are_those_of_xlas_plans_or_little_more(fields, batch, context, megabytes):
    memory = models.estimate_memory(models.read_config(fields), batch=batch, context=context)
    plan = memory.weights + memory.cache + 1e6 * megabytes
    assert plan <= memory.peak <= 1.02 * plan


def test_devices_share_weights_and_cache():
    config = models.read_config(LLAMA_3_1_70B)
    one = models.estimate_memory(config, batch=4, context=4096)
    each = models.estimate_memory(config, batch=4, context=4096, devices=8)
    assert each.weights == -(-one.weights // 8)
    assert each.plain_weights == -(-one.plain_weights // 8)
    assert each.cache == -(-one.cache // 8)
    assert each.prefill == one.prefill


@pytest.mark.parametrize("compress", [True, False])
def test_more_never_takes_less(compress):
    config = models.read_config(LLAMA_3_2_1B)
    for batches, contexts in (([1, 2, 3, 8, 100, 5000], [512]), ([1], range(64, 9000, 500))):
        peaks = [
            models.estimate_memory(config, batch=batch, context=context, compress=compress).peak
            for batch in batches
            for context in contexts
        ]
        assert peaks == sorted(peaks)


def test_largest_that_fits():
    config = models.read_config(LLAMA_3_1_8B)
    for limit in (0, 1, 2, 63, 64, 1000, 131_071, 131_072, 10**6):
        assert _fit.longest_context(config, lambda n, most=limit: n <= most) == min(limit, 131_072)
        assert _fit.largest_batch(lambda n, most=limit: n <= most) == limit
    assert _fit.largest_batch(lambda n: True) == _fit.MOST_SEQUENCES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"context": 0}, "context is 0"),
        ({"devices": 0}, "devices is 0"),
        ({"context": 131_073}, "made for 131072 positions"),
    ],
)
def test_what_cannot_be_asked(sizes, message):
    config = models.read_config(LLAMA_3_1_8B)
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
    small, large, floats, *rest = (_fit.estimate_tensors([tensor]) for tensor in tensors)
    for weights in (small, floats, *rest):
        assert weights.exact and weights.compressed == weights.plain
    assert large.least < large.compressed < large.most < large.plain
    assert _fit.sum_weights([small, large]).plain == small.plain + large.plain
    assert _fit.estimate_tensors([]) == (0, 0, 0, 0)
