"""The tensors of a Hugging Face checkpoint, and their places in the parameters."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from df11_jax._files.model_config import FUSED
from df11_jax._host_arrays import BFLOAT16
from df11_jax.checkpoints.detect import find_quantization
from df11_jax.models import _transformer
from df11_jax.models._config import Config
from df11_jax.models._experts import EXPERTS
from df11_jax.models._layer_types import LayerType, count_stack, layer_types
from df11_jax.models._sharding import TABLES, is_wide, shard_shape, table_shape

# The last part of a parameter's path, and what Hugging Face calls it.
_LEAVES = {"kernel": "weight", "scale": "weight", "taps": "weight"}

# Multimodal checkpoints have longer prefixes.
_EMBEDDING = re.compile(r"(.*\.)?embed_tokens\.weight")
_HEAD = re.compile(r"(.*\.)?lm_head\.weight")

# Tensors that nothing needs: buffers that are computed, and keys and values of layers that share
# those of others.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embed_scale)")
_UNSHARED = re.compile(r".*\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight")
# Parts of a model that text generation does not need: those for images and sound, and those that
# guess several tokens.
_LEFT_OUT = re.compile(
    r"(.*?\.)??(?P<part>vision_tower|vision_model|vision_embedder|visual|audio_tower|embed_vision"
    r"|embed_audio|multi_modal_projector)\..*|(?P<head>mtp)\..*"
)

# The projection of embeddings for layers, one tensor for all, of which each block has its rows.
_PROJECTION = "per_layer_model_projection.weight"

# The modules of linear layers that several of ours are fused in.
_DELTA_NET = {
    f"linear_attn.{name}": tuple(f"linear_attn.{part}" for part in parts)
    for name, parts in (
        ("in_proj_qkv", ("in_proj_q", "in_proj_k", "in_proj_v")),
        ("conv1d", ("conv1d_q", "conv1d_k", "conv1d_v")),
    )
}
# The modules of a block that have other names, and those that several of ours are fused in.
_MODULES: dict[str, dict[str, tuple[str, ...]]] = FUSED | {
    "glm4": FUSED["glm4"]
    | {
        "post_self_attn_layernorm": ("post_attention_layernorm",),
        "post_attention_layernorm": ("pre_feedforward_layernorm",),
        "post_mlp_layernorm": ("post_feedforward_layernorm",),
    },
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
}

# The first of the two tensors in which all experts of a layer are, as transformers 5 has them.
_FUSED_EXPERTS = "mlp.experts.gate_up_proj"
# Of experts that are tensors each, the module and the names of the matrices, where they are others.
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
}


class TensorPlace(NamedTuple):
    """The place of a checkpoint's tensor in the parameters, or of some rows of a fused one.

    Attributes:
        path: the path of the leaf.
        layer: the slice of the leaf, a stack of layers; None if the leaf is no such stack.
        shape: the shape of the tensor in the checkpoint, or of these rows.
        expert: the expert of the layer; None if the leaf is no stack of experts.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    expert: int | None = None

    @property
    def is_table(self) -> bool:
        """Whether the parameter is a table."""
        return self.path[0] in TABLES

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameter: bfloat16, or float32 where checkpoints may have that."""
        return np.dtype(np.float32) if is_wide(self.path) else BFLOAT16

    @property
    def is_kernel(self) -> bool:
        """Whether the parameter is the tensor's transpose: Flax's [in, out] for [out, in]."""
        return self.path[-1] == "kernel"


# The places of a tensor: one, or those of a fused one, whose rows are one after the other.
Places = tuple[TensorPlace, ...]


def tensor_shape(places: Places) -> tuple[int, ...]:
    """The shape of the tensor that has these places."""
    rows, experts = sum(place.shape[0] for place in places), {place.expert for place in places}
    if len(experts) > 1:
        return len(experts), rows // len(experts), *places[0].shape[1:]
    return rows, *places[0].shape[1:]


def split_rows(tensor: Shaped[np.ndarray, "..."], places: Places) -> list[np.ndarray]:
    """The rows of a tensor for each of its places, which are views of it."""
    ends = np.cumsum([place.shape[0] for place in places])
    return np.split(tensor.reshape(-1, *places[0].shape[1:]), ends[:-1])


def list_places(
    config: Config,
    prefix: str = "model.",
    head: str = "lm_head.weight",
    fused_experts: bool = False,
) -> dict[str, Places]:
    """The places of all tensors that a transformer needs, by name.

    Args:
        config: the configuration of the transformer.
        prefix: the prefix of the names.
        head: the name of the output head.
        fused_experts: all experts of a layer are in two tensors, and not in three each.
    """
    table = (config.vocab, config.dim)
    places: dict[str, Places] = {
        f"{prefix}embed_tokens.weight": (TensorPlace(("embed_tokens",), None, table),)
    }
    blocks, stacked = _block_places(config, fused_experts), config.layers_differ
    before: Counter[LayerType] = Counter()
    projections: list[TensorPlace] = []
    for layer, type_ in enumerate(layer_types(config)):
        index = before[type_] if stacked else layer
        before[type_] += 1
        for name, parts in blocks[type_].items():
            here = tuple(place._replace(layer=index) for place in parts)
            if name == _PROJECTION:
                projections += here
            else:
                places[f"{prefix}layers.{layer}.{name}"] = here
    if config.per_layer is not None:
        vocab, dim = config.per_layer.vocab, config.per_layer.dim
        places[f"{prefix}{_PROJECTION}"] = tuple(projections)
        for name, shape in (
            ("embed_tokens_per_layer", (vocab, config.layers * dim)),
            ("per_layer_projection_norm", (dim,)),
        ):
            places[f"{prefix}{name}.weight"] = (TensorPlace((name,), None, shape),)
    places[f"{prefix}norm.weight"] = (TensorPlace(("norm",), None, (config.dim,)),)
    if not config.tied:
        places[head] = (TensorPlace(("lm_head",), None, table),)
    return places


def _block_places(config: Config, fused_experts: bool) -> dict[LayerType, dict[str, Places]]:
    """The places of the tensors of the first block of each type, by their names within it."""
    shapes, stacked = _transformer.block_shapes(config), config.layers_differ

    def of(type_: LayerType) -> dict[str, Places]:
        ours = {}
        stack = ("layers", type_) if stacked else ("layers",)
        for keys, leaf in jax.tree.leaves_with_path(shapes[type_] if stacked else shapes):
            *modules, last = (key.key for key in keys)
            name = ".".join((*modules, _LEAVES.get(last, last)))
            ours[name] = TensorPlace((*stack, *modules, last), 0, leaf.shape[::-1])
        theirs = {
            f"{name}.weight": tuple(ours.pop(f"{module}.weight") for module in modules)
            for name, modules in _MODULES.get(config.family, {}).items()
            if f"{modules[0]}.weight" in ours
        }
        block = {name: (place,) for name, place in ours.items()} | theirs
        return _expert_places(block, config, fused_experts)

    return {type_: of(type_) for type_ in dict.fromkeys(layer_types(config))}


def _expert_places(block: dict[str, Places], config: Config, fused: bool) -> dict[str, Places]:
    """The places of the tensors of a block, those of its experts by the names in a checkpoint.

    Args:
        block: the places by our names, one for each matrix of all experts.
        config: the configuration of the transformer.
        fused: all experts are in two tensors, gate and up of each one after the other.
    """
    if not config.experts.count:
        return block
    module, names = _EXPERT_NAMES.get(config.family, ("mlp", {}))
    others, experts = {}, {}
    for name, (place, *_) in block.items():
        if EXPERTS in place.path:
            of_all = enumerate([place._replace(shape=place.shape[:-1])] * config.experts.count)
            experts[place.path[-2]] = [place._replace(expert=e) for e, place in of_all]
        else:
            others[name if fused else name.replace("mlp.gate", f"{module}.gate")] = block[name]
    if fused:
        gate_up = zip(experts["gate_proj"], experts["up_proj"], strict=True)
        others[_FUSED_EXPERTS] = tuple(itertools.chain(*gate_up))
        return others | {"mlp.experts.down_proj": tuple(experts["down_proj"])}
    return others | {
        f"{module}.experts.{place.expert}.{names.get(matrix, matrix)}.weight": (place,)
        for matrix, places in experts.items()
        for place in places
    }


def leaf_shape(
    place: TensorPlace, config: Config, devices: int, stages: int = 1
) -> tuple[int, ...]:
    """The shape of the leaf that a tensor belongs to.

    Args:
        place: the place of the tensor.
        config: the configuration of the transformer.
        devices: the number of devices that the leaf is divided for.
        stages: the number of stages that these are divided into.
    """
    if place.is_table:
        return table_shape(config, devices, place.path[0])
    if place.layer is None:
        return place.shape
    shards, shape = shard_shape(place.shape, place.path, config, devices // stages)
    experts = () if place.expert is None else (config.experts.count,)
    return (shards * count_stack(place.path, config), *experts, *shape[::-1])


def find_places(names: Iterable[str], config: Config) -> dict[str, Places]:
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
    prefix = embedding.removesuffix("embed_tokens.weight")
    fused = f"{prefix}layers.0.{_FUSED_EXPERTS}" in names
    places = list_places(config, prefix, head, fused)
    if missing := [name for name in places if name not in names]:
        if method := find_quantization(names, {}):
            raise ValueError(
                f"the weights are quantized ({method}, by the names of tensors), which is not "
                "supported; get the model in bfloat16"
            )
        raise ValueError(_some("tensors are missing", missing, config))
    # A checkpoint may have an output head although it is tied.
    unknown = sorted(
        name for name in names - set(places) - {head} if not _is_left_out(name, config)
    )
    if unknown:
        raise ValueError(_some("tensors have no place in the model", unknown, config))
    return places


def left_out_parts(names: Iterable[str]) -> list[str]:
    """The parts of a checkpoint that text generation does not need."""
    matches = filter(None, map(_LEFT_OUT.fullmatch, names))
    return sorted({match["part"] or match["head"] for match in matches})


def _is_left_out(name: str, config: Config) -> bool:
    if _IGNORED.fullmatch(name) or _LEFT_OUT.fullmatch(name):
        return True
    # Layers of other parts may have such names, too.
    match = _UNSHARED.fullmatch(name)
    first = config.layers - config.shared_layers
    return match is not None and first <= int(match[1]) < config.layers


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
