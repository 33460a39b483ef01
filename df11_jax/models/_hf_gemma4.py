"""What is particular about the `config.json` of Gemma 4: heads by layer type, and shared keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from df11_jax._brief import brief
from df11_jax.models._config import Config, FullAttention, PerLayer
from df11_jax.models._hf_fields import Fields, UnsupportedModelError

_TEXT: dict[str, Any] = {
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 30,
    "num_key_value_heads": 4,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "vocab_size": 262_144,
}
# The values that transformers assumes, by family. The unified ones have no embeddings for layers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_text": _TEXT
    | {
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
    },
    "gemma4_unified_text": _TEXT | {"max_position_embeddings": 262_144, "sliding_window": 1024},
}


def extend(config: Config, f: Fields) -> Config:
    """The configuration with what the fields say of heads, shared keys and embeddings for layers.

    Raises:
        UnsupportedModelError: a field says something that is not implemented.
        ValueError: a field is missing or wrong; the message names it.
    """
    if f.get("enable_moe_block"):
        raise UnsupportedModelError(
            f"{f.where}: enable_moe_block {brief(f.get('enable_moe_block'))}, a mixture of "
            "experts, is not supported for Gemma 4, only dense models are, such as gemma-4-31B"
        )
    if config.attention_softcap is not None:
        raise UnsupportedModelError(
            f"{f.where}: attn_logit_softcapping is not supported for the model_type {config.family}"
        )
    full = _full_attention(config, f)
    if full.head_dim % 2 or config.heads % full.kv_heads:
        raise ValueError(
            f"{f.where}: expected num_attention_heads to be a multiple of the key-value heads of "
            f"full_attention layers, and their head_dim to be even, got {config.heads}, "
            f"{full.kv_heads} and {full.head_dim}"
        )
    shared = (
        f.size("num_kv_shared_layers", most=config.layers - 1)
        if f.get("num_kv_shared_layers")
        else 0
    )
    if set(config.sliding) != set(config.sliding[: config.layers - shared]):
        raise f.error("num_kv_shared_layers", "layers of each type before those that share keys")
    return dataclasses.replace(
        config,
        output_bias=config.qkv_bias,
        qk_norm=True,
        post_norms=True,
        value_norm=True,
        layer_scalar=True,
        embedding_scale=config.dim**0.5,
        attention_scale=1.0,
        full=full,
        shared_layers=shared,
        shared_hidden=config.hidden * (2 if f.flag("use_double_wide_mlp") else 1),
        per_layer=_per_layer(config, f),
    )


def _full_attention(config: Config, f: Fields) -> FullAttention:
    """The heads of full layers, which may be said for each of them."""
    keys_are_values = f.flag("attention_k_eq_v")
    if f.get("per_layer_config") is None:
        name = "num_global_key_value_heads"
        kv_heads = f.size(name, config.kv_heads) if keys_are_values else config.kv_heads
        return FullAttention(f.size("global_head_dim"), kv_heads, keys_are_values)
    said = f.get("per_layer_config")
    if not isinstance(said, Mapping) or not all(isinstance(x, Mapping) for x in said.values()):
        raise f.error("per_layer_config", "a JSON object of JSON objects")
    full = [i for i, sliding in enumerate(config.sliding) if not sliding]
    # transformers fills the numbers of the layers up with zeros.
    layers = sorted(int(name) if name.isdecimal() else -1 for name in said)
    first: Mapping[str, Any] = next(iter(said.values()), {})
    if layers != full or any(each != first for each in said.values()):
        raise UnsupportedModelError(
            f"{f.where}: per_layer_config of the layers {brief(', '.join(said))} is not supported, "
            "only one that is the same for all full_attention layers, and for no others"
        )
    if unknown := sorted(set(first) - {"head_dim", "num_key_value_heads"}):
        raise UnsupportedModelError(
            f"{f.where}: per_layer_config: {brief(unknown[0])} is not supported, only head_dim and "
            "num_key_value_heads are"
        )
    inner = Fields(first, f"{f.where}: per_layer_config")
    return FullAttention(
        inner.size("head_dim", config.head_dim),
        inner.size("num_key_value_heads", config.kv_heads),
        keys_are_values,
    )


def _per_layer(config: Config, f: Fields) -> PerLayer | None:
    if not f.get("hidden_size_per_layer_input"):
        return None
    vocab = f.size("vocab_size_per_layer_input")
    if vocab < config.vocab:
        raise f.error("vocab_size_per_layer_input", f"at least vocab_size, {config.vocab}")
    return PerLayer(vocab, f.size("hidden_size_per_layer_input"))
