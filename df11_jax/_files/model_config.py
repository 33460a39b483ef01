"""The `config.json` of a model: defaults of model families, and the weights that it describes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from df11_jax._brief import brief

_MISTRAL = {
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_GLM = {
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
}
# The values that transformers assumes for fields that a config.json leaves out, by model type. The
# configs of text models inside of others, as in Gemma 3, leave out all fields with these values.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "max_position_embeddings": 2048},
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": {
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "max_position_embeddings": 262_144,
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16_384,
            "rope_theta": 1_000_000.0,
            "rope_type": "yarn",
        },
        "vocab_size": 131_072,
    },
    "phi3": {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "glm": _GLM,
    "glm4": _GLM,
    "qwen2": {"hidden_act": "silu", "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "vocab_size": 262_208,
    },
}

# The matrices of a layer that several others are rows of, one after the other, by model type.
_GATE_UP: dict[str, tuple[str, ...]] = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        **_GATE_UP,
    },
    "glm": _GATE_UP,
    "glm4": _GATE_UP,
}
_LAYER_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

_MODEL = r"(?:(?:model|language_model)\.)*"
_LAYER = re.compile(_MODEL + r"layers\.(\d+)\.")
_WEIGHT = re.compile(_MODEL + r"(?:layers\.\d+\.)?((?:self_attn\.|mlp\.)?\w+)\.weight")


class ModelConfig:
    """The weights of a model, as its configuration describes them.

    Attributes:
        family: the model type of the language model.
        is_known: whether this library knows the family.
        is_nested: whether the language model is a part of a larger one.
        is_tied: whether the embeddings are the weights of `lm_head`, too.
    """

    def __init__(self, config: Mapping[str, Any] | None, where: str = "config.json") -> None:
        """Takes the configuration.

        Args:
            config: the content of a config.json, or None if there is none.
            where: the name of the file, for messages.
        """
        self._where = where
        config = config or {}
        text = config.get("text_config", config)
        text = text if isinstance(text, Mapping) else {}
        self.is_nested = "text_config" in config
        self.family: Any = text.get("model_type")
        defaults = DEFAULTS.get(self.family) if isinstance(self.family, str) else None
        self.is_known = defaults is not None
        given = {key: value for key, value in text.items() if value is not None}
        self._fields: dict[str, Any] = {**(defaults or {}), **given}
        is_tied = config.get("tie_word_embeddings", self._fields.get("tie_word_embeddings"))
        self.is_tied = is_tied is True
        # Others, such as classifiers, have another head.
        heads = ("ForCausalLM", "ForConditionalGeneration")
        architectures = config.get("architectures")
        named = architectures if isinstance(architectures, list) else []
        self._is_for_text = any(str(name).endswith(heads) for name in named)

    def tied_names(self, names: Iterable[str]) -> tuple[str, str] | None:
        """The names of `lm_head` and of the embeddings if these are one tensor; else None.

        Args:
            names: the names of all tensors.
        """
        parts = {match[1]: name for name in names if (match := _WEIGHT.fullmatch(name))}
        if self.is_tied and "lm_head" in parts and "embed_tokens" in parts:
            return parts["lm_head"], parts["embed_tokens"]
        return None

    def layer_matrices(self) -> list[str]:
        """The names of the matrices of a layer, in the order in which they are computed."""
        fused = FUSED.get(self.family, {}) if self.is_known else {}
        wholes = {part: whole for whole, parts in fused.items() for part in parts}
        return list(dict.fromkeys(wholes.get(name, name) for name in _LAYER_MATRICES))

    def shape(self, name: str) -> tuple[int, int] | None:
        """The shape of a weight matrix; None if it is not known.

        Raises:
            ValueError: the config lacks a number that is needed, or it is not a positive integer.
        """
        match = _WEIGHT.fullmatch(name)
        if match is None or not self.is_known:
            return None
        parts = FUSED.get(self.family, {}).get(match[1], (match[1],))
        shapes = [self._shape(part) for part in parts]
        known = [shape for shape in shapes if shape is not None]
        return (sum(rows for rows, _ in known), known[0][1]) if known else None

    def _shape(self, part: str) -> tuple[int, int] | None:
        if part in ("self_attn.q_proj", "self_attn.o_proj"):
            heads = self._number("num_attention_heads")
        elif part in ("self_attn.k_proj", "self_attn.v_proj"):
            heads = self._number("num_key_value_heads", "num_attention_heads")
        elif part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            outer = self._number("intermediate_size")
        elif part in ("embed_tokens", "lm_head"):
            outer = self._number("vocab_size")
        else:
            return None
        hidden = self._number("hidden_size")
        if part.startswith("self_attn."):
            outer = heads * self._head_dim()
        reads_hidden = part not in ("self_attn.o_proj", "mlp.down_proj")
        return (outer, hidden) if reads_hidden else (hidden, outer)

    def missing_part(self, names: Iterable[str]) -> str | None:
        """A part of the model without any tensor; None if there is none or the parts are unknown.

        Args:
            names: the names of all tensors.

        Raises:
            ValueError: the number of layers is not a positive integer.
        """
        if not self.is_known or "num_hidden_layers" not in self._fields:
            return None
        names = list(names)
        present = {int(match[1]) for name in names if (match := _LAYER.match(name))}
        for layer in range(self._number("num_hidden_layers")):
            if layer not in present:
                return f"layer {layer}"
        parts = {match[1] for name in names if (match := _WEIGHT.fullmatch(name))}
        expected = ["embed_tokens", "norm"]
        if self._is_for_text and not self.is_tied:
            expected.append("lm_head")
        return next((part for part in expected if part not in parts), None)

    def _head_dim(self) -> int:
        if "head_dim" in self._fields:
            return self._number("head_dim")
        return self._number("hidden_size") // self._number("num_attention_heads")

    def _number(self, field: str, otherwise: str | None = None) -> int:
        if field not in self._fields and otherwise is not None:
            field = otherwise
        number = self._fields.get(field)
        if not isinstance(number, int) or isinstance(number, bool) or number <= 0:
            raise ValueError(
                f"{self._where}: {field} is {brief(number)}, expected a positive integer (model "
                f"type {self.family})"
            )
        return number
