import pytest
from model_configs import GEMMA_2_2B, GEMMA_3_4B, LLAMA_3_1_8B, QWEN_3_4B

from df11_jax import published
from df11_jax._files.model_config import ModelConfig


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


def test_fused_matrices():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    phi = {"model_type": "phi3", "intermediate_size": 160, "vocab_size": 300} | sizes
    layer = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert published.default_pattern_dict(phi)[r"model\.layers\.\d+"] == layer
    config = ModelConfig(phi)
    shapes = [config.shape(f"model.layers.0.{name}.weight") for name in layer]
    assert shapes == [(128, 64), (64, 64), (320, 64), (64, 160)]
    glm = published.default_pattern_dict(phi | {"model_type": "glm4"})[r"model\.layers\.\d+"]
    assert glm[2:] == ["self_attn.v_proj", *layer[1:]]


@pytest.mark.parametrize("config", [None, {}, {"model_type": "phi"}, {"model_type": ["llama"]}])
def test_unknown_families(config):
    with pytest.raises(ValueError, match="no default pattern dict for the model type"):
        published.default_pattern_dict(config)
