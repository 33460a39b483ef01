"""What is read from `config.json`, and what is refused."""

import math

import families
import numpy as np
import pytest

from df11_jax.models import Rope, UnsupportedModelError, read_config
from df11_jax.models._rope import frequencies

LLAMA = families.CONFIGS["llama"]

# As the files of well-known models have it, without what is of no interest here.
GEMMA_3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
LLAMA_3_2_1B = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def test_llama_3_2():
    config = read_config(LLAMA_3_2_1B)
    assert (config.dim, config.hidden, config.layers, config.vocab) == (2048, 8192, 16, 128256)
    assert (config.heads, config.kv_heads, config.head_dim) == (32, 8, 64)
    assert config.rope == Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert config.tied and not any(config.sliding)
    assert config.norm_eps == 1e-5 and config.attention_scale == 1 / 8


def test_gemma_3_files_say_little():
    config = read_config(GEMMA_3_4B)
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab, config.window) == (262_208, 1024)
    assert [i for i in range(34) if not config.sliding[i]] == [5, 11, 17, 23, 29]
    assert config.rope == Rope(1_000_000.0, "linear", 8.0)
    assert config.local_rope == Rope(10_000.0)
    assert config.tied and config.activation == "gelu_tanh" and config.attention_scale == 1 / 16
    assert config.embedding_scale == math.sqrt(2560)
    assert config.attention_softcap is None and config.logit_softcap is None


def test_old_and_new_ways_to_say_the_same():
    new = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new["rope_parameters"] = {"rope_theta": 500_000.0} | LLAMA["rope_scaling"]
    assert read_config(new) == read_config(LLAMA)

    gemma = families.CONFIGS["gemma3_text"]
    new = {k: v for k, v in gemma.items() if not k.startswith("rope")}
    new["layer_types"] = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    assert read_config(new) == read_config(gemma)


def test_null_means_nothing_said():
    nulls = {"rope_scaling": None, "num_key_value_heads": None, "head_dim": None}
    config = read_config(LLAMA | nulls)
    assert config.rope == Rope(500_000.0)
    assert (config.kv_heads, config.head_dim) == (4, 16)


def test_families_differ_where_they_should():
    read = {family: read_config(fields) for family, fields in families.CONFIGS.items()}
    assert {name for name, c in read.items() if c.qkv_bias} == {"llama-biases", "qwen2"}
    assert {name for name, c in read.items() if c.output_bias} == {"llama-biases"}
    assert {name for name, c in read.items() if c.qk_norm} == {"qwen3", "gemma3_text"}
    assert {name for name, c in read.items() if c.post_norms} == {"gemma3_text"}
    assert {name for name, c in read.items() if any(c.sliding)} == {"qwen3", "gemma3_text"}


def test_frequencies():
    plain = frequencies(Rope(10_000.0), 64)
    np.testing.assert_allclose(plain, 10_000.0 ** (-np.arange(32) / 32), rtol=1e-6)
    np.testing.assert_allclose(frequencies(Rope(10_000.0, "linear", 4.0), 64), plain / 4)
    scaled = frequencies(Rope(10_000.0, "llama3", 8.0, 1.0, 4.0, 512), 64)
    turns = 512 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the model_type None is not supported, only llama, qwen2, qwen3"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        (LLAMA | {"rope_scaling": {"type": "yarn"}}, "rope_scaling: the RoPE type 'yarn'"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic"}}, "the RoPE type 'dynamic'"),
        (LLAMA | {"hidden_act": "relu2"}, "the activation 'relu2'"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": 0.5}},
            "rope_scaling: partial_rotary_factor",
        ),
        (LLAMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (LLAMA | {"layer_types": ["linear_attention"] * 3}, "the layer type 'linear_attention'"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(fields, "somewhere/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing, expected a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads to be a multiple"),
        ({"head_dim": 15}, "head_dim to be even"),
        ({"layer_types": ["full_attention"]}, "layer_types .* expected a list of 3"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected a JSON object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
    ],
)
def test_fields_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=rf"somewhere/config\.json.*{message}"):
        read_config(LLAMA | change, "somewhere/config.json")
