"""Reading a Hugging Face `config.json`, or refusing it."""

import sys
from collections.abc import Mapping
from typing import Any

from df11_jax._brief import brief
from df11_jax._files.model_config import DEFAULTS
from df11_jax.models._config import Config, Rope

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"

# Larger sizes are mistakes, which would otherwise come to light only after much time and memory.
_MOST, _MOST_LAYERS = 2**24, 10_000

_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")

# Fields that change what is computed, with the values under which they do not.
_NOT_IMPLEMENTED = {
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1),
}


class UnsupportedModelError(ValueError):
    """A model that this package cannot run; the message names what is not supported about it."""


def read_config(fields: Mapping[str, Any], where: str = "config.json") -> Config:
    """Reads the configuration of a transformer from the content of a `config.json`.

    Args:
        fields: the JSON object; of multimodal Gemma 3, only the text part is used.
        where: the name of the file in messages.

    Returns:
        The configuration of the transformer.

    Raises:
        UnsupportedModelError: the model has another architecture, or a variant of it that is not
            implemented.
        ValueError: a field is missing or wrong; the message names it.
    """
    if fields.get("model_type") == "gemma3":
        fields, where = _gemma3_text(fields, where), f"{where}: text_config"
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UnsupportedModelError(
            f"{where}: the model_type {brief(family)} is not supported, only "
            f"{', '.join(_FAMILIES)} and gemma3 are"
        )
    f = _Fields(DEFAULTS[family] | {k: v for k, v in fields.items() if v is not None}, where)
    for name, harmless in _NOT_IMPLEMENTED.items():
        if f.get(name) not in harmless:
            raise UnsupportedModelError(f"{where}: {name} {brief(f.get(name))} is not supported")

    if f.get("quantization_config") is not None:
        method = f.inner("quantization_config").get("quant_method")
        raise UnsupportedModelError(
            f"{where}: quantization_config: the weights are quantized ({brief(method)}), which is "
            "not supported; get the model in bfloat16"
        )

    gemma = family == "gemma3_text"
    dim, heads = f.size("hidden_size"), f.size("num_attention_heads")
    layers = f.size("num_hidden_layers", most=_MOST_LAYERS)
    head_dim = f.size("head_dim", dim // heads)
    kv_heads = f.size("num_key_value_heads", heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, and "
            f"head_dim to be even, got {heads}, {kv_heads} and {head_dim}"
        )
    sliding = _sliding_layers(f, layers, gemma)
    bias = f.flag("attention_bias")
    rope, local_rope = _ropes(f, gemma)
    return Config(
        family=family,
        vocab=f.size("vocab_size"),
        dim=dim,
        hidden=f.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=f.size("max_position_embeddings"),
        rope=rope,
        local_rope=local_rope,
        sliding=sliding,
        window=f.size("sliding_window") if any(sliding) else 0,
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        mlp_bias=f.flag("mlp_bias") and family == "llama",
        qk_norm=gemma or family == "qwen3",
        post_norms=gemma,
        unit_offset=gemma,
        activation=_activation(f),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        embedding_scale=dim**0.5 if gemma else 1.0,
        attention_scale=f.number("query_pre_attn_scalar", head_dim) ** -0.5,
        attention_softcap=_softcap(f, "attn_logit_softcapping"),
        logit_softcap=_softcap(f, "final_logit_softcapping"),
        tied=f.flag("tie_word_embeddings"),
    )


def _gemma3_text(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The fields of the text part of a multimodal Gemma 3."""
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"{where}: text_config is {brief(text)}, expected a JSON object")
    # These are about the whole model, and transformers reads them there.
    outer = ("quantization_config", "tie_word_embeddings")
    whole = {name: fields[name] for name in outer if fields.get(name) is not None}
    return {"model_type": "gemma3_text"} | dict(text) | whole


class _Fields:
    """A JSON object whose fields are read with messages that name them."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = fields
        self.where = where

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def size(self, name: str, default: int | None = None, most: int = _MOST) -> int:
        value = self._fields.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(name, f"an integer from 1 to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._fields.get(name, default)
        # Integers of JSON have any number of digits.
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._fields.get(name, False)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def inner(self, name: str) -> "_Fields":
        value = self._fields.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, "a JSON object")
        return _Fields({k: v for k, v in value.items() if v is not None}, f"{self.where}: {name}")

    def error(self, name: str, expected: str) -> ValueError:
        if name not in self._fields:
            return ValueError(f"{self.where}: {name} is missing, expected {expected}")
        return ValueError(
            f"{self.where}: {name} is {brief(self._fields[name])}, expected {expected}"
        )


def _activation(f: _Fields) -> str:
    name = f.get("hidden_activation") or f.get("hidden_act")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{f.where}: the activation {brief(name)} is not supported, only "
            f"{', '.join(_ACTIVATIONS)} are"
        )
    return _ACTIVATIONS[name]


def _softcap(f: _Fields, name: str) -> float | None:
    return None if f.get(name) is None else f.number(name)


def _sliding_layers(f: _Fields, layers: int, gemma: bool) -> tuple[bool, ...]:
    """A flag for each layer, whether it has a sliding window."""
    types = f.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise f.error("layer_types", f"a list of {layers}, one a layer")
        if unknown := [type_ for type_ in types if type_ not in (_FULL, _SLIDING)]:
            raise UnsupportedModelError(
                f"{f.where}: the layer type {brief(unknown[0])} is not supported, only {_FULL} and "
                f"{_SLIDING} are"
            )
        return tuple(type_ == _SLIDING for type_ in types)
    if gemma:
        pattern = f.size("sliding_window_pattern")
        return tuple((i + 1) % pattern != 0 for i in range(layers))
    if f.flag("use_sliding_window"):
        first = f.size("max_window_layers", 28)
        return tuple(i >= first for i in range(layers))
    return (False,) * layers


def _ropes(f: _Fields, gemma: bool) -> tuple[Rope, Rope]:
    """The position embeddings of full and of sliding layers."""
    parameters = f.inner("rope_parameters")
    theta, local_theta = f.number("rope_theta", 10_000), f.number("rope_local_base_freq", 10_000)
    if parameters.get(_FULL) is None and parameters.get(_SLIDING) is None:
        scaling = parameters if f.get("rope_scaling") is None else f.inner("rope_scaling")
        rope = _rope(scaling, theta, f)
        return rope, Rope(local_theta) if gemma else rope
    return (
        _rope(parameters.inner(_FULL), theta, f),
        _rope(parameters.inner(_SLIDING), local_theta, f),
    )


def _rope(scaling: _Fields, theta: float, f: _Fields) -> Rope:
    theta = scaling.number("rope_theta", theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor") not in _NOT_IMPLEMENTED["partial_rotary_factor"]:
        raise UnsupportedModelError(f"{scaling.where}: partial_rotary_factor is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, scaling.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            scaling.number("factor"),
            scaling.number("low_freq_factor"),
            scaling.number("high_freq_factor"),
            scaling.size("original_max_position_embeddings", f.size("max_position_embeddings")),
        )
    raise UnsupportedModelError(
        f"{scaling.where}: the RoPE type {brief(kind)} is not supported, only default, linear and "
        "llama3 are"
    )
