import pytest
from model_configs import (
    GEMMA_2_2B,
    GEMMA_3_4B,
    LLAMA_1_7B,
    LLAMA_3_1_8B,
    MISTRAL_NEMO,
    QWEN_2_5_05B,
    QWEN_3_4B,
)

from df11_jax._files.model_config import ModelConfig


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


@pytest.mark.parametrize("config", [None, {}, {"model_type": "phi"}, {"model_type": ["llama"]}])
def test_unknown_families(config):
    model = ModelConfig(config)
    assert model.shape("model.layers.0.mlp.up_proj.weight") is None
    assert model.missing_part([]) is None


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
