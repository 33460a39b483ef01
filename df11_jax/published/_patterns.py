"""Pattern dicts, which define the units of a model and the tensors of each unit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from df11_jax._brief import brief
from df11_jax._files.model_config import DEFAULTS, ModelConfig
from df11_jax.published import _expressions

PatternDict = Mapping[str, Sequence[str]]

# The length of all expressions together: four times that of any known pattern dict. The time to
# match is proportional to it.
_MAX_CHARACTERS = 4000


def check_pattern_dict(pattern_dict: Any, where: str) -> dict[str, list[str]]:
    """Checks a pattern dict, and returns a copy of it.

    Args:
        pattern_dict: regular expressions for module names, and lists of attributes.
        where: the origin of the pattern dict, for messages.

    Raises:
        ValueError: the pattern dict has other contents, or an expression is invalid or not
            supported.
    """
    if not isinstance(pattern_dict, Mapping):
        raise ValueError(f"{where}: pattern_dict is {brief(pattern_dict)}, expected a dict")
    size = sum(len(str(pattern)) for pattern in pattern_dict)
    if size > _MAX_CHARACTERS:
        raise ValueError(
            f"{where}: pattern_dict has regular expressions of {size:,} characters, expected up to "
            f"{_MAX_CHARACTERS:,}"
        )
    for pattern, attributes in pattern_dict.items():
        if isinstance(attributes, str) or not (
            isinstance(attributes, Sequence) and all(isinstance(a, str) for a in attributes)
        ):
            raise ValueError(
                f"{where}: pattern_dict: {brief(pattern)}: expected a list of attributes such as "
                f"'self_attn.q_proj', got {brief(attributes)}"
            )
        try:
            _expressions.check(pattern)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: pattern_dict: {brief(pattern)} is not a regular expression that this "
                f"library matches: {error}"
            ) from None
    return {pattern: list(attributes) for pattern, attributes in pattern_dict.items()}


def match_module(pattern_dict: PatternDict, module: str) -> tuple[str, ...] | None:
    """The tensors of a module's unit, in the order in which they are joined.

    Args:
        pattern_dict: the pattern dict; the first pattern that matches the whole name counts.
        module: the name of the module, such as `model.layers.0`.

    Returns:
        Names such as `model.layers.0.self_attn.q_proj.weight`, or None if no pattern matches.
    """
    for pattern, attributes in pattern_dict.items():
        if _expressions.fullmatch(pattern, module):
            if not attributes:
                return (f"{module}.weight",)
            return tuple(f"{module}.{attribute}.weight" for attribute in attributes)
    return None


def match_units(pattern_dict: PatternDict, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Finds the units among the modules that own tensors of the given names.

    Args:
        pattern_dict: regular expressions for module names, and lists of attributes.
        names: the names of all tensors of a model.

    Returns:
        The modules, and the tensors of their units, in the order of `names`.

    Raises:
        ValueError: a unit lacks a tensor, or a tensor would be part of two units.
    """
    names = list(names)
    existing = set(names)
    modules = dict.fromkeys(
        name[:end] for name in names for end in range(len(name)) if name[end] == "."
    )
    units: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    for module in modules:
        tensors = match_module(pattern_dict, module)
        if tensors is None:
            continue
        for name in tensors:
            if name not in existing:
                raise ValueError(
                    f"{module}: matches the pattern dict, which makes {name} part of its unit, but "
                    "there is no such tensor"
                )
            if name in owners:
                raise ValueError(
                    f"{name}: would be part of the units {owners[name]} and {module}; a tensor "
                    "belongs to one"
                )
            owners[name] = module
        units[module] = tensors
    return units


def default_pattern_dict(config: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The pattern dict that DFloat11's own checkpoints of a model family have.

    Each layer is a unit of its matrices. `lm_head` and the embeddings are one unit each if
    they are not tied: readers of a tied `lm_head` do not know that it is compressed.
    (DFloat11/Qwen3-8B-DF11, Llama-3.1-8B-Instruct-DF11 and Mistral-Nemo-Instruct-2407-DF11 are
    like that; the units of Qwen3-4B-DF11 and gemma-3-4b-it-DF11, which are tied, are layers only.)

    Args:
        config: the content of the model's config.json. Model types llama, mistral, ministral,
            ministral3, phi3, glm, glm4, qwen2, qwen3, gemma2, gemma3_text, and gemma3 and mistral3
            (their language models) are known.

    Raises:
        ValueError: the model type is unknown.
    """
    model = ModelConfig(config)
    if not model.is_known:
        raise ValueError(
            f"there is no default pattern dict for the model type {brief(model.family)}, only for "
            f"{', '.join(DEFAULTS)}; pass one (--pattern-dict)"
        )
    inner = r"(?:language_model\.model|model\.language_model)" if model.is_nested else "model"
    patterns: dict[str, list[str]] = {}
    if not model.is_tied:
        patterns[r"(?:language_model\.)?lm_head" if model.is_nested else "lm_head"] = []
        patterns[rf"{inner}\.embed_tokens"] = []
    patterns[rf"{inner}\.layers\.\d+"] = model.layer_matrices()
    return patterns
