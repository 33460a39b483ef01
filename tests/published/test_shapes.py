import json

import numpy as np
import pytest
from tiny_llama import ORIGINAL, original, save

from df11_jax import published
from df11_jax.published._shapes import ModelConfig, read_shapes

LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_1_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
MISTRAL_NEMO = {
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
QWEN_2_5_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
QWEN_3_4B = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "vocab_size": 256000,
}
GEMMA_3_4B = {
    "model_type": "gemma3",
    # Everything else has its default.
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


@pytest.mark.parametrize(
    ("config", "q", "k", "up", "vocabulary"),
    [
        (LLAMA_3_1_8B, (4096, 4096), (1024, 4096), (14336, 4096), 128256),
        (LLAMA_1_7B, (4096, 4096), (4096, 4096), (11008, 4096), 32000),
        (MISTRAL_NEMO, (4096, 5120), (1024, 5120), (14336, 5120), 131072),
        (QWEN_2_5_05B, (896, 896), (128, 896), (4864, 896), 151936),
        (QWEN_3_4B, (4096, 2560), (1024, 2560), (9728, 2560), 151936),
        (GEMMA_2_2B, (2048, 2304), (1024, 2304), (9216, 2304), 256000),
        (GEMMA_3_4B, (2048, 2560), (1024, 2560), (10240, 2560), 262208),
    ],
)
def test_shapes_of_families(config, q, k, up, vocabulary):
    model = ModelConfig(config)
    nested = ("language_model.model.", "model.language_model.")
    for prefix in nested if model.is_nested else ("model.", ""):
        shapes = {
            f"{prefix}layers.{config.get('num_hidden_layers', 1) - 1}.{part}.weight": shape
            for part, shape in (
                ("self_attn.q_proj", q),
                ("self_attn.k_proj", k),
                ("self_attn.v_proj", k),
                ("self_attn.o_proj", q[::-1]),
                ("mlp.gate_proj", up),
                ("mlp.up_proj", up),
                ("mlp.down_proj", up[::-1]),
            )
        }
        shapes[f"{prefix}embed_tokens.weight"] = vocabulary, up[1]
        assert {name: model.shape(name) for name in shapes} == shapes
    assert model.shape("lm_head.weight") == (vocabulary, up[1])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "",
    ],
)
def test_other_tensors_have_no_known_shape(name):
    assert ModelConfig(LLAMA_3_1_8B).shape(name) is None
    assert ModelConfig(GEMMA_3_4B).shape(name) is None


@pytest.mark.parametrize("config", [None, {}, {"model_type": "phi3"}, {"model_type": ["llama"]}])
def test_unknown_families(config):
    model = ModelConfig(config)
    assert model.shape("model.layers.0.mlp.up_proj.weight") is None
    assert model.missing_part([]) is None
    with pytest.raises(ValueError, match="no default pattern dict for the model type"):
        published.default_pattern_dict(config)


@pytest.mark.parametrize("hidden_size", [None, 0, -1, 1.5, "4096", True])
def test_bad_numbers(hidden_size):
    model = ModelConfig(LLAMA_3_1_8B | {"hidden_size": hidden_size})
    with pytest.raises(ValueError, match=r"config\.json: hidden_size is .* positive integer"):
        model.shape("lm_head.weight")


def test_missing_parts():
    layers = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(32)]
    others = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    config = LLAMA_3_1_8B | {"architectures": ["LlamaForCausalLM"]}
    model = ModelConfig(config)
    assert model.missing_part(layers + others) is None
    assert model.missing_part(layers[:7] + layers[8:] + others) == "layer 7"
    for i, part in enumerate(("embed_tokens", "norm", "lm_head")):
        assert model.missing_part(layers + others[:i] + others[i + 1 :]) == part
    for change in ({"tie_word_embeddings": True}, {"architectures": ["LlamaModel"]}):
        assert ModelConfig(config | change).missing_part(layers + others[:2]) is None


def test_default_pattern_dicts():
    layer = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert list(published.default_pattern_dict(LLAMA_3_1_8B).items()) == [
        ("lm_head", []),
        (r"model\.embed_tokens", []),
        (r"model\.layers\.\d+", layer),
    ]
    assert published.default_pattern_dict(QWEN_3_4B) == {r"model\.layers\.\d+": layer}
    assert published.default_pattern_dict(GEMMA_2_2B) == {r"model\.layers\.\d+": layer}
    (pattern,) = published.default_pattern_dict(GEMMA_3_4B)
    for prefix in ("model.language_model", "language_model.model"):
        names = [f"{prefix}.layers.3.{part}.weight" for part in layer]
        units = published._patterns.match_units({pattern: layer}, names)
        assert units == {f"{prefix}.layers.3": tuple(names)}


def test_shapes_from_files(tmp_path):
    expected = {name: array.shape for name, array in original().items()}
    assert read_shapes(ORIGINAL) == expected
    assert read_shapes(str(ORIGINAL / "model.safetensors")) == expected
    names = list(expected)
    files = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, members in files.items():
        save(tmp_path / file, {name: original()[name] for name in members})
    assert read_shapes(tmp_path) == expected
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, members in files.items() for name in members}
    index.write_text(json.dumps({"weight_map": weight_map}))
    save(tmp_path / "other.safetensors", {"x": np.zeros(3)})
    assert read_shapes(index) == expected
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        read_shapes(index)


def test_shapes_from_a_mapping():
    assert read_shapes(None) == {}
    assert read_shapes({"a": [np.int64(2), 3], "b": ()}) == {"a": (2, 3), "b": ()}


@pytest.mark.parametrize("shape", [(2, -3), (2.0, 3), "ab"])
def test_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"shapes: a: .* is not a shape"):
        read_shapes({"a": shape})


def test_no_shapes_there(tmp_path):
    with pytest.raises(ValueError, match=r"there are no \*\.safetensors files"):
        read_shapes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_shapes(tmp_path / "x.safetensors")
