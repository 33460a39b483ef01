"""What is particular about the `config.json` of Qwen 3.5: layers with a recurrent state."""

import dataclasses
from typing import Any

from df11_jax._brief import brief
from df11_jax.models._config import Config, DeltaRule
from df11_jax.models._hf_fields import Fields, UnsupportedModelError

_TEXT: dict[str, Any] = {
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 32_768,
    "num_attention_heads": 16,
    "partial_rotary_factor": 0.25,
    "vocab_size": 248_320,
}
# The values that transformers assumes, by family: dense models, and mixtures of experts.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _TEXT
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    },
    "qwen3_5_moe_text": _TEXT
    | {
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 512,
    },
}
_FULL, _LINEAR = "full_attention", "linear_attention"
# Fields that change what is computed, with the values under which they do not.
_NOT_IMPLEMENTED = {
    "attn_output_gate": (None, True),
    "output_gate_type": (None, "swish"),
    "hidden_act": ("silu",),
}


def extend(config: Config, f: Fields) -> Config:
    """The configuration with what the fields say of linear layers.

    Raises:
        UnsupportedModelError: a field says something that is not implemented.
        ValueError: a field is missing or wrong; the message names it.
    """
    for name, harmless in _NOT_IMPLEMENTED.items():
        if f.get(name) not in harmless:
            raise UnsupportedModelError(
                f"{f.where}: {name} {brief(f.get(name))} is not supported for the model_type "
                f"{config.family}, only {brief(harmless[-1])} is"
            )
    layers = _linear_layers(f, config.layers)
    rule = DeltaRule(
        layers=layers,
        key_heads=f.size("linear_num_key_heads"),
        value_heads=f.size("linear_num_value_heads"),
        key_dim=f.size("linear_key_head_dim"),
        value_dim=f.size("linear_value_head_dim"),
        taps=f.size("linear_conv_kernel_dim", most=64),
    )
    if rule.value_heads % rule.key_heads:
        raise f.error("linear_num_value_heads", f"a multiple of {rule.key_heads} key heads")
    return dataclasses.replace(
        config,
        output_bias=config.qkv_bias,
        qk_norm=True,
        unit_offset=True,
        output_gate=True,
        delta_rule=rule if any(layers) else None,
    )


def _linear_layers(f: Fields, count: int) -> tuple[bool, ...]:
    """A flag for each layer, whether it has a recurrent state."""
    types = f.get("layer_types")
    if types is None:
        interval = f.size("full_attention_interval")
        return tuple((i + 1) % interval != 0 for i in range(count))
    if not isinstance(types, list) or len(types) != count:
        raise f.error("layer_types", f"a list of {count}, one a layer")
    if unknown := [type_ for type_ in types if type_ not in (_FULL, _LINEAR)]:
        raise UnsupportedModelError(
            f"{f.where}: the layer type {brief(unknown[0])} is not supported, only {_FULL} and "
            f"{_LINEAR} are"
        )
    return tuple(type_ == _LINEAR for type_ in types)
