"""The tensors of a Hugging Face checkpoint, and their places in the parameters."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from df11_jax.checkpoints.detect import find_quantization
from df11_jax.models import _transformer
from df11_jax.models._config import Config

# The last part of a parameter's path, and what Hugging Face calls it.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Multimodal checkpoints have longer prefixes.
_EMBEDDING = re.compile(r"(.*\.)?embed_tokens\.weight")
_HEAD = re.compile(r"(.*\.)?lm_head\.weight")

# Tensors that text generation does not need: buffers that are computed, and the parts for images.
_IGNORED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|embed_scale)"
    r"|(.*\.)?(vision_tower|vision_model|multi_modal_projector)\..*"
)


class TensorPlace(NamedTuple):
    """The place of a checkpoint's tensor in the parameters.

    Attributes:
        path: the path of the leaf.
        layer: the slice of the leaf, a stack of layers; None if the leaf is no such stack.
        shape: the shape of the tensor in the checkpoint.
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


def list_places(
    config: Config, prefix: str = "model.", head: str = "lm_head.weight"
) -> dict[str, TensorPlace]:
    """The places of all tensors that a transformer needs, by name.

    Args:
        config: the configuration of the transformer.
        prefix: the prefix of the names.
        head: the name of the output head.
    """
    table = (config.vocab, config.dim)
    places = {f"{prefix}embed_tokens.weight": TensorPlace(("embed_tokens",), None, table)}
    block = jax.tree.leaves_with_path(_transformer.block_shapes(config))
    for layer in range(config.layers):
        for keys, leaf in block:
            *modules, last = (key.key for key in keys)
            name = ".".join((*modules, _LEAVES[last]))
            path = ("layers", *modules, last)
            places[f"{prefix}layers.{layer}.{name}"] = TensorPlace(path, layer, leaf.shape[::-1])
    places[f"{prefix}norm.weight"] = TensorPlace(("norm",), None, (config.dim,))
    if not config.tied:
        places[head] = TensorPlace(("lm_head",), None, table)
    return places


def find_places(names: Iterable[str], config: Config) -> dict[str, TensorPlace]:
    """The places of a checkpoint's tensors.

    Args:
        names: the names of all its tensors.
        config: the configuration of the transformer.

    Returns:
        The places of the tensors that are needed, by name.

    Raises:
        ValueError: tensors are missing, or there are some that the transformer has no place for.
    """
    names = set(names)
    embedding = min(filter(_EMBEDDING.fullmatch, names), default="model.embed_tokens.weight")
    head = min(filter(_HEAD.fullmatch, names), default="lm_head.weight")
    places = list_places(config, embedding.removesuffix("embed_tokens.weight"), head)
    if missing := [name for name in places if name not in names]:
        if method := find_quantization(names, {}):
            raise ValueError(
                f"the weights are quantized ({method}, by the names of tensors), which is not "
                "supported; get the model in bfloat16"
            )
        raise ValueError(_some("tensors are missing", missing, config))
    # A checkpoint may have an output head although it is tied.
    unknown = sorted(name for name in names - set(places) - {head} if not _IGNORED.fullmatch(name))
    if unknown:
        raise ValueError(_some("tensors have no place in the model", unknown, config))
    return places


def find_tied_head(names: Iterable[str], config: Config) -> str | None:
    """The output head that a checkpoint has although it is tied to the embedding."""
    return min(filter(_HEAD.fullmatch, names), default=None) if config.tied else None


def _some(what: str, names: list[str], config: Config) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{what} (a {config.family} transformer, by its config.json): {', '.join(names[:3])}{more}"
    )


def nest(leaves: Mapping[tuple[str, ...], object]) -> PyTree:
    """Nested dictionaries of leaves that are given by path."""
    params: dict[str, object] = {}
    for path, leaf in leaves.items():
        inner = params
        for key in path[:-1]:
            inner = inner.setdefault(key, {})  # type: ignore[assignment]
        inner[path[-1]] = leaf
    return params
