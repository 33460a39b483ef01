"""The shapes of a unit's tensors in the model, which the unit does not store."""

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from df11_jax._files.directory import read_index
from df11_jax._files.safetensors import TensorFile

Shapes = Mapping[str, Sequence[int]] | str | os.PathLike[str]

# What the config of a family leaves out if it is the default. Configs inside of others, as Gemma 3
# has them, leave out all defaults.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 256,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "vocab_size": 262208,
    },
}

FAMILIES = tuple(_FAMILIES)

_MODEL = r"(?:(?:model|language_model)\.)*"
_LAYER = re.compile(_MODEL + r"layers\.(\d+)\.")
_WEIGHT = re.compile(_MODEL + r"(?:layers\.\d+\.)?((?:self_attn\.|mlp\.)?\w+)\.weight")


class ModelConfig:
    """What the config of a model says about its weights.

    Attributes:
        family: the model type, of the language model if there are others.
        is_known: whether this library knows the family.
        is_nested: whether the language model is a part of a larger one.
        is_tied: whether the embeddings are the weights of `lm_head`, too.
    """

    def __init__(self, config: Mapping[str, Any] | None, where: str = "config.json") -> None:
        """Takes the configuration.

        Args:
            config: the content of a config.json, or None if there is none.
            where: it comes from, for messages.
        """
        self._where = where
        config = config or {}
        text = config.get("text_config", config)
        text = text if isinstance(text, Mapping) else {}
        self.is_nested = "text_config" in config
        self.family: Any = text.get("model_type")
        defaults = _FAMILIES.get(self.family) if isinstance(self.family, str) else None
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
        """Which tensors are one and the same: `lm_head` and the embeddings; None if there are none.

        Args:
            names: of all tensors.
        """
        parts = {match[1]: name for name in names if (match := _WEIGHT.fullmatch(name))}
        if self.is_tied and "lm_head" in parts and "embed_tokens" in parts:
            return parts["lm_head"], parts["embed_tokens"]
        return None

    def shape(self, name: str) -> tuple[int, int] | None:
        """The shape of a weight matrix; None if it is not known.

        Raises:
            ValueError: the config lacks a number that is needed, or it is not a positive integer.
        """
        match = _WEIGHT.fullmatch(name)
        if match is None or not self.is_known:
            return None
        part = match[1]
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
        """A part of the model that no tensor belongs to; None if there is none, or nobody knows.

        Args:
            names: of all tensors.

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
                f"{self._where}: {field} is {number!r:.80}, expected a positive integer (model "
                f"type {self.family})"
            )
        return number


def read_shapes(shapes: Shapes | None) -> dict[str, tuple[int, ...]]:
    """Reads shapes by tensor name.

    Args:
        shapes: the shapes, or the original model: its safetensors file, index, or directory. Only
            headers are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is invalid, or a shape is invalid.
    """
    if shapes is None:
        return {}
    if isinstance(shapes, Mapping):
        return {name: _as_shape(name, shape) for name, shape in shapes.items()}
    path = Path(shapes)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"shapes: {path}: there are no *.safetensors files in it")
    elif path.name.endswith(".index.json"):
        files = [path.with_name(file) for file in dict.fromkeys(read_index(path).values())]
    else:
        files = [path]
    headers = (TensorFile(file).entries for file in files)
    return {name: entry.shape for entries in headers for name, entry in entries.items()}


def _as_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(map(operator.index, shape))
    except TypeError:
        dims = (-1,)
    if min(dims, default=0) < 0:
        raise ValueError(f"shapes: {name}: {shape!r:.80} is not a shape")
    return dims


def check_shape(shape: Sequence[int], size: int, where: str) -> None:
    """Checks that a shape has as many elements as the unit has for the tensor.

    Raises:
        ValueError: the shape has another number of elements.
    """
    if math.prod(shape) != size:
        raise ValueError(
            f"{where}: its shape in the model is {list(shape)}, which is {math.prod(shape)} "
            f"elements, but the unit has {size} for it; pass the shapes of the model that was "
            "compressed (shapes=...)"
        )
