"""Reading a Hugging Face `config.json`, or refusing it."""

import math
from collections.abc import Mapping
from typing import Any

from df11_jax._brief import brief
from df11_jax._files.model_config import DEFAULTS
from df11_jax.models import _hf_gemma4, _hf_mixtures, _hf_qwen3_5
from df11_jax.models._config import ROPE_KINDS, Config, Rope
from df11_jax.models._hf_fields import MOST, MOST_LAYERS, Fields, UnsupportedModelError
from df11_jax.models._rope import rotary_dim

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"

_FAMILIES = (
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "phi3",
    "glm",
    "glm4",
    "qwen2",
    "qwen3",
    "gemma3_text",
    *_hf_mixtures.DEFAULTS,
    *_hf_qwen3_5.DEFAULTS,
    *_hf_gemma4.DEFAULTS,
)
# The models that see as well, and the model type of their text part where they do not say it.
_MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_GEMMA_4, _QWEN_3_5 = tuple(_hf_gemma4.DEFAULTS), tuple(_hf_qwen3_5.DEFAULTS)
# Those of other families tell their shapes to the published format as well.
_DEFAULTS = DEFAULTS | _hf_mixtures.DEFAULTS | _hf_qwen3_5.DEFAULTS | _hf_gemma4.DEFAULTS

_WITH_OUTPUT_BIAS = ("llama", "qwen3", "qwen3_moe", "gemma3_text")
_WITH_PARTIAL_ROPE = ("phi3", "glm", "glm4", *_QWEN_3_5)
# Families whose layers all have the window that `sliding_window` says, whatever else is there.
_WITH_ONE_WINDOW = ("mistral", "ministral3", "phi3", "mixtral")

# Families whose layers have none, whatever is there.
_WITHOUT_WINDOWS = ("llama", "glm", "glm4")
# Fields that transformers reads in some families alone.
_GEMMA = ("gemma3_text", *_GEMMA_4)
_READ_IN = {
    "attn_logit_softcapping": _GEMMA,
    "final_logit_softcapping": _GEMMA,
    "hidden_activation": _GEMMA,
    "query_pre_attn_scalar": _GEMMA,
}

# Fields that change what is computed, with the values under which they do not.
_NOT_IMPLEMENTED = {
    "is_causal": (None, True),  # transformers lets all tokens attend to all others otherwise
    "use_bidirectional_attention": (None, False, "vision"),  # which is among images
}
_ROPE_TYPES = (*ROPE_KINDS, "dynamic")


def read_config(fields: Mapping[str, Any], where: str = "config.json") -> Config:
    """Reads the configuration of a transformer from the content of a `config.json`.

    Args:
        fields: the JSON object; of multimodal models, only the text part is used.
        where: the name of the file in messages.

    Returns:
        The configuration of the transformer.

    Raises:
        UnsupportedModelError: the model has another architecture, or a variant of it that is not
            implemented.
        ValueError: a field is missing or wrong; the message names it.
    """
    family = fields.get("model_type")
    if isinstance(family, str) and family in _MULTIMODAL:
        fields, where = _text_fields(fields, _MULTIMODAL[family], where), f"{where}: text_config"
        family = fields["model_type"]
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UnsupportedModelError(
            f"{where}: the model_type {brief(family)} is not supported, only "
            f"{', '.join((*_FAMILIES, *_MULTIMODAL))} are"
        )
    # Null says something only of a window, and not in a family whose layers say which have one; and
    # of embeddings for layers.
    keeps = {"sliding_window", "hidden_size_per_layer_input"}
    if family in _GEMMA:
        keeps.remove("sliding_window")
    said = {
        k: v
        for k, v in fields.items()
        if (v is not None or k in keeps) and family in _READ_IN.get(k, (family,))
    }
    f = Fields(_DEFAULTS[family] | said, where)
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
    layers = f.size("num_hidden_layers", most=MOST_LAYERS)
    head_dim = f.size("head_dim", dim // heads)
    kv_heads = f.size("num_key_value_heads", heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, and "
            f"head_dim to be even, got {heads}, {kv_heads} and {head_dim}"
        )
    bias = f.flag("attention_bias")
    rope, local_rope = _ropes(f, family, head_dim)
    max_length = f.size("max_position_embeddings")
    if rope.kind == "yarn":
        # Configurations to which YaRN was added may still say the length without it.
        max_length = max(max_length, int(min(rope.factor * rope.original_length, MOST)))
    sliding = _sliding_layers(f, layers, family)
    window = f.size("sliding_window") if any(sliding) else 0
    if window >= max_length and local_rope == rope and family not in _GEMMA_4:
        sliding, window = (False,) * layers, 0
    if window and rope.kind == "longrope":
        raise UnsupportedModelError(
            f"{where}: sliding_window {window} together with the RoPE type longrope is not "
            f"supported, only windows of all {max_length} positions are"
        )
    hidden, experts = _hf_mixtures.read_mlp(f, family)
    config = Config(
        family=family,
        vocab=f.size("vocab_size"),
        dim=dim,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=max_length,
        rope=rope,
        local_rope=local_rope,
        sliding=sliding,
        window=window,
        qkv_bias=bias or family == "qwen2" or (family == "qwen2_moe" and f.flag("qkv_bias")),
        output_bias=bias and family in _WITH_OUTPUT_BIAS,
        mlp_bias=f.flag("mlp_bias") and family == "llama",
        qk_norm=gemma or family in ("qwen3", "qwen3_moe"),
        post_norms=gemma or family == "glm4",
        unit_offset=gemma,
        activation=_activation(f),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        embedding_scale=dim**0.5 if gemma else 1.0,
        attention_scale=f.number("query_pre_attn_scalar", head_dim) ** -0.5,
        attention_softcap=_softcap(f, "attn_logit_softcapping"),
        logit_softcap=_softcap(f, "final_logit_softcapping"),
        tied=f.flag("tie_word_embeddings"),
        experts=experts,
    )
    if family in _GEMMA_4:
        return _hf_gemma4.extend(config, f)
    return _hf_qwen3_5.extend(config, f) if family in _QWEN_3_5 else config


def _text_fields(fields: Mapping[str, Any], family: str, where: str) -> Mapping[str, Any]:
    """The fields of the text part of a multimodal model."""
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"{where}: text_config is {brief(text)}, expected a JSON object")
    # These are about the whole model, and transformers reads them there.
    outer = ("quantization_config", "tie_word_embeddings")
    whole = {name: fields[name] for name in outer if fields.get(name) is not None}
    return {"model_type": family} | dict(text) | whole


def _activation(f: Fields) -> str:
    name = f.get("hidden_activation") or f.get("hidden_act")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{f.where}: the activation {brief(name)} is not supported, only "
            f"{', '.join(_ACTIVATIONS)} are"
        )
    return _ACTIVATIONS[name]


def _softcap(f: Fields, name: str) -> float | None:
    return None if f.get(name) is None else f.number(name)


def _sliding_layers(f: Fields, layers: int, family: str) -> tuple[bool, ...]:
    """A flag for each layer, whether it has a sliding window."""
    if family in _QWEN_3_5:  # its layer types are others
        return (False,) * layers
    types, has_window = f.get("layer_types"), f.get("sliding_window") is not None
    said = None
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise f.error("layer_types", f"a list of {layers}, one a layer")
        if unknown := [type_ for type_ in types if type_ not in (_FULL, _SLIDING)]:
            raise UnsupportedModelError(
                f"{f.where}: the layer type {brief(unknown[0])} is not supported, only {_FULL} and "
                f"{_SLIDING} are"
            )
        said = tuple(type_ == _SLIDING for type_ in types)
    if family in _WITHOUT_WINDOWS:
        return (False,) * layers
    if family in _WITH_ONE_WINDOW:
        flags = (has_window,) * layers
        if said not in (None, flags):
            raise UnsupportedModelError(
                f"{f.where}: layer_types of several kinds are not supported for the model_type "
                f"{family}, whose layers all have the sliding_window; for ministral they are"
            )
        return flags
    if said is None and family in _GEMMA:
        pattern = f.size("sliding_window_pattern")
        said = tuple((i + 1) % pattern != 0 for i in range(layers))
    if said is not None:
        # Whatever is said, Gemma 4 ends with a full layer.
        return (*said[:-1], False) if family in _GEMMA_4 else said
    if family == "ministral":
        return (has_window,) * layers
    if f.flag("use_sliding_window") and has_window:
        if family == "qwen3_moe":
            return (True,) * layers
        first = f.size("max_window_layers", 28, least=0)
        if family == "qwen2_moe":
            return tuple(i % 2 == 0 and i < first for i in range(layers))
        return tuple(i >= first for i in range(layers))
    return (False,) * layers


def _ropes(f: Fields, family: str, head_dim: int) -> tuple[Rope, Rope]:
    """The position embeddings of full and of sliding layers."""
    parameters = f.inner("rope_parameters")
    theta, local_theta = f.number("rope_theta", 10_000), f.number("rope_local_base_freq", 10_000)
    if parameters.get(_FULL) is None and parameters.get(_SLIDING) is None:
        scaling = parameters if f.get("rope_scaling") is None else f.inner("rope_scaling")
        rope = _rope(scaling, theta, f, family, head_dim)
        return rope, Rope(local_theta) if family == "gemma3_text" else rope
    return (
        _rope(parameters.inner(_FULL), theta, f, family, head_dim),
        _rope(parameters.inner(_SLIDING), local_theta, f, family, head_dim),
    )


def _rope(scaling: Fields, theta: float, f: Fields, family: str, head_dim: int) -> Rope:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):  # earlier names
        kind = "longrope"
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"{scaling.where}: the RoPE type {brief(kind)} is not supported, only "
            f"{', '.join(_ROPE_TYPES)} are"
        )
    said = scaling if scaling.get("partial_rotary_factor") is not None else f
    fraction = said.number("partial_rotary_factor", 1)
    if kind == "proportional" and fraction <= 1:
        theta, factor = scaling.number("rope_theta", theta), scaling.number("factor", 1)
        return Rope(theta, kind, factor, fraction=fraction)
    if fraction > 1 or (fraction < 1 and family not in _WITH_PARTIAL_ROPE):
        raise UnsupportedModelError(
            f"{said.where}: partial_rotary_factor {fraction:g} is not supported, only up to 1 for "
            f"{', '.join(_WITH_PARTIAL_ROPE)}"
        )
    common: dict[str, Any] = {
        "theta": scaling.number("rope_theta", theta),
        "fraction": fraction,
        "interleaved": family in ("glm", "glm4"),
    }
    size = rotary_dim(Rope(**common), head_dim)
    if not size or size % 2:
        raise said.error("partial_rotary_factor", f"an even part of a head of {head_dim}")
    # Queries grow whatever the frequencies are.
    growth = "llama_4_scaling_beta"
    if family == "ministral3" and (kind == "yarn" or scaling.get(growth) is not None):
        common |= {
            "query_growth": scaling.number(growth),
            "original_length": _original_length(scaling, f),
        }
    # "dynamic" changes nothing up to the length that the model was made for.
    if kind in ("default", "dynamic"):
        return Rope(**common)
    if kind == "linear":
        return Rope(**common, kind=kind, factor=scaling.number("factor"))
    longest, length = f.size("max_position_embeddings"), _original_length(scaling, f)
    common |= {"kind": kind, "original_length": length}
    if kind == "llama3":
        return Rope(
            **common,
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    factor = scaling.number("factor", longest / length)
    if kind == "longrope":
        stretch = math.log(max(factor, 1)) / math.log(max(length, 2))
        return Rope(
            **common,
            short_factors=scaling.numbers("short_factor", size // 2),
            long_factors=scaling.numbers("long_factor", size // 2),
            attention_factor=scaling.number("attention_factor", math.sqrt(1 + stretch)),
        )
    if scaling.get("truncate") not in (None, True):
        raise UnsupportedModelError(f"{scaling.where}: truncate is not supported, only true is")
    if common["theta"] <= 1:
        raise ValueError(f"{f.where}: rope_theta is {common['theta']:g}, expected more than 1")
    return Rope(
        **common,
        factor=factor,
        low_freq_factor=scaling.number("beta_slow", 1),
        high_freq_factor=scaling.number("beta_fast", 32),
        attention_factor=scaling.number("attention_factor", _yarn_attention(scaling, factor)),
    )


def _original_length(scaling: Fields, f: Fields) -> int:
    """The length that a model was made for before its frequencies were scaled."""
    outer = f if f.get("original_max_position_embeddings") is not None else scaling
    return outer.size("original_max_position_embeddings", f.size("max_position_embeddings"))


def _yarn_attention(scaling: Fields, factor: float) -> float:
    """The attention factor of YaRN where it is not said."""
    stretch = 0.1 * math.log(max(factor, 1))
    if scaling.get("mscale") is None or scaling.get("mscale_all_dim") is None:
        return 1 + stretch
    scale, all_dims = scaling.number("mscale"), scaling.number("mscale_all_dim")
    return (1 + stretch * scale) / (1 + stretch * all_dims)
