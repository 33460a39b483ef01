"""Which tensors of a Hugging Face checkpoint the decoder is made of, and where they go."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from df11_jax.models import _transformer
from df11_jax.models._config import Config

# The last part of a parameter's path, and what Hugging Face calls it.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Multimodal checkpoints have more in front of the names.
_EMBEDDING = re.compile(r"(.*\.)?embed_tokens\.weight")
_HEAD = re.compile(r"(.*\.)?lm_head\.weight")

# Tensors that text generation has no use for: buffers that are computed, and images' parts.
_IGNORED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|embed_scale)"
    r"|(.*\.)?(vision_tower|vision_model|multi_modal_projector)\..*"
)


class Slot(NamedTuple):
    """The place of a tensor.

    Attributes:
        path: in the parameters.
        layer: which slice of the stack there; None for leaves that are no stacks of layers.
        shape: of the tensor, as the checkpoint has it.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_table(self) -> bool:
        return self.path in (("embed_tokens",), ("lm_head",))

    @property
    def is_kernel(self) -> bool:
        """Whether the parameter is the tensor's transpose: Flax's [in, out] for [out, in]."""
        return self.path[-1] == "kernel"


def make_slots(
    config: Config, prefix: str = "model.", head: str = "lm_head.weight"
) -> dict[str, Slot]:
    """The places of all tensors that a decoder needs, by name.

    Args:
        config: of the decoder.
        prefix: what names begin with.
        head: name of the output head.
    """
    table = (config.vocab, config.dim)
    slots = {f"{prefix}embed_tokens.weight": Slot(("embed_tokens",), None, table)}
    block = jax.tree.leaves_with_path(_transformer.block_shapes(config))
    for layer in range(config.layers):
        for keys, leaf in block:
            *modules, kind = (key.key for key in keys)
            name = ".".join((*modules, _LEAVES[kind]))
            path = ("layers", *modules, kind)
            slots[f"{prefix}layers.{layer}.{name}"] = Slot(path, layer, leaf.shape[::-1])
    slots[f"{prefix}norm.weight"] = Slot(("norm",), None, (config.dim,))
    if not config.tied:
        slots[head] = Slot(("lm_head",), None, table)
    return slots


def find_slots(names: Iterable[str], config: Config) -> dict[str, Slot]:
    """The places of a checkpoint's tensors.

    Args:
        names: of all its tensors.
        config: of the decoder.

    Returns:
        A slot for each tensor that is needed, by name.

    Raises:
        ValueError: tensors are missing, or there are some that the decoder has no place for.
    """
    names = set(names)
    embedding = min(filter(_EMBEDDING.fullmatch, names), default="model.embed_tokens.weight")
    head = min(filter(_HEAD.fullmatch, names), default="lm_head.weight")
    slots = make_slots(config, embedding.removesuffix("embed_tokens.weight"), head)
    if missing := [name for name in slots if name not in names]:
        raise ValueError(_some("tensors are missing", missing, config))
    # A tied head may be there all the same.
    unknown = sorted(name for name in names - set(slots) - {head} if not _IGNORED.fullmatch(name))
    if unknown:
        raise ValueError(_some("tensors have no place in the model", unknown, config))
    return slots


def find_tied_head(names: Iterable[str], config: Config) -> str | None:
    """The output head that a checkpoint has although it is tied to the embedding."""
    return min(filter(_HEAD.fullmatch, names), default=None) if config.tied else None


def _some(what: str, names: list[str], config: Config) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} (a {config.family} decoder, by its config.json): {', '.join(names[:3])}{more}"


def nest(leaves: Mapping[tuple[str, ...], object]) -> PyTree:
    """Nested dictionaries from leaves by path."""
    params: dict[str, object] = {}
    for path, leaf in leaves.items():
        place = params
        for key in path[:-1]:
            place = place.setdefault(key, {})  # type: ignore[assignment]
        place[path[-1]] = leaf
    return params
