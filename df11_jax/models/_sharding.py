"""Which tensors of a transformer are sharded, and along which axis.

Attention and the delta rule are divided by heads, the MLP and each expert by its hidden units,
embeddings and output head by rows. If there are fewer key-value heads than devices,
several devices have the same one. Norms, routers, what mixes embeddings for layers, and biases that
are added after a sum over the devices, are replicated. A tensor of the blocks that is sharded
becomes a stack [devices * layers, ...] in which the slices of the first device come first. Sharded
along this axis, it is a stack [layers, ...] on each device, which can decompress the slices by
itself.

Layers can also be divided into stages, one after the other, each of which has some of the devices:
a pipeline, with tensor parallelism within each stage. Stacks are the same then, but sharded
further: each device has its slices of its stage's layers, of what would be replicated, too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Shaped

from df11_jax.models import tables
from df11_jax.models._config import Config
from df11_jax.models._layer_types import count_stack, layer_types

# The names of the axes of a mesh: stages, and the devices of each.
STAGES, AXIS = "stage", "model"
# The order in which a stack is divided, so that it is the same stack for any number of stages.
ALL_AXES = AXIS, STAGES

# Where `jax.device_put` puts an array; None for the default device.
DeviceOrSharding: TypeAlias = jax.Device | jax.sharding.Sharding | None

# Kernels that are divided by their outputs, and those that are divided by their inputs.
_BY_OUTPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_BY_OUTPUTS |= {f"in_proj_{part}" for part in "qkvzba"} | {f"conv1d_{part}" for part in "qkv"}
_BY_INPUTS = frozenset({"o_proj", "out_proj", "down_proj"})
TABLES = frozenset({"embed_tokens", "lm_head", "embed_tokens_per_layer"})
# Parameters with a number for each value head, which checkpoints may have in float32.
_WIDE = frozenset({"A_log", "dt_bias"})


def shard_config(config: Config, devices: int, stages: int = 1) -> Config:
    """The configuration of the part of a transformer that one of several devices computes.

    Args:
        config: the configuration of the whole transformer.
        devices: the number of devices.
        stages: the number of stages that they are divided into.

    Returns:
        The configuration of a shard; for one device, `config` itself.

    Raises:
        ValueError: layers cannot be divided into as many stages, or heads or hidden units by the
            number of devices of each.
    """
    if stages < 1 or devices % stages:
        raise ValueError(f"{devices} devices cannot be divided into {stages} stages")
    config, devices = _stage_config(config, stages), devices // stages
    if devices == 1:
        return config
    heads, full, rule, experts = config.heads, config.full, config.delta_rule, config.experts
    hidden = math.gcd(config.hidden, experts.shared_hidden)
    all_kv_heads = sorted({config.kv_heads, *([full.kv_heads] if full else [])})

    def can_share(kv_heads: int, count: int) -> bool:
        return kv_heads % count == 0 or count % kv_heads == 0

    wrong = {f"{heads} query heads": heads % devices}
    wrong |= {f"{n} key-value heads": not can_share(n, devices) for n in all_kv_heads}
    wrong[f"{hidden} hidden units"] = hidden % devices
    common = math.gcd(heads, hidden)
    if rule is not None:
        wrong[f"{rule.key_heads} key heads of linear layers"] = rule.key_heads % devices
        common = math.gcd(common, rule.key_heads)
    if any(wrong.values()):
        possible = [
            str(n)
            for n in range(1, common + 1)
            if common % n == 0 and all(can_share(kv_heads, n) for kv_heads in all_kv_heads)
        ]
        raise ValueError(
            f"{' and '.join(what for what in wrong if wrong[what])} cannot be divided among "
            f"{devices} devices: expected {' or '.join(possible)}"
        )

    def share(kv_heads: int) -> int:
        return kv_heads // min(kv_heads, devices)

    return dataclasses.replace(
        config,
        heads=heads // devices,
        kv_heads=share(config.kv_heads),
        hidden=config.hidden // devices,
        experts=dataclasses.replace(experts, shared_hidden=experts.shared_hidden // devices),
        shared_hidden=config.shared_hidden // devices,
        full=full and dataclasses.replace(full, kv_heads=share(full.kv_heads)),
        delta_rule=rule
        and dataclasses.replace(
            rule, key_heads=rule.key_heads // devices, value_heads=rule.value_heads // devices
        ),
        axis=AXIS,
    )


def _stage_config(config: Config, stages: int) -> Config:
    """The configuration of one of several stages, which have layers of the same types."""
    if stages == 1:
        return config

    types = layer_types(config)
    # Embeddings for layers, and keys of other layers, are those of layers by their numbers.
    most = 1 if config.per_layer or config.shared_layers else config.layers
    possible = [n for n in range(1, most + 1) if types[: config.layers // n] * n == types]
    if stages not in possible:
        numbers = " or ".join(map(str, possible))
        raise ValueError(
            f"the {config.layers} layers of a {config.family} transformer cannot be divided into "
            f"{stages} stages with layers of the same types: expected {numbers}"
        )
    layers, rule = config.layers // stages, config.delta_rule
    return dataclasses.replace(
        config,
        layers=layers,
        sliding=config.sliding[:layers],
        delta_rule=rule and dataclasses.replace(rule, layers=rule.layers[:layers]),
        axis=AXIS,
        stages=stages,
    )


def partition_spec(path: Sequence[str]) -> PartitionSpec:
    """The sharding of the leaf at a path: along its first axis, or replicated."""
    if _is_sharded(path):
        return PartitionSpec(ALL_AXES)
    return PartitionSpec(STAGES) if path[0] == "layers" else PartitionSpec()


def is_wide(path: Sequence[str]) -> bool:
    """Whether the leaf at a path is float32, whatever its tensor is."""
    return path[-1] in _WIDE or tuple(path[-3:]) == ("linear_attn", "norm", "scale")


def table_shape(config: Config, devices: int, name: str = "embed_tokens") -> tuple[int, int, int]:
    """Shape of a table that is divided over devices."""
    vocab, dim = config.vocab, config.dim
    if name == "embed_tokens_per_layer":
        assert config.per_layer is not None
        vocab, dim = config.per_layer.vocab, config.layers * config.per_layer.dim
    return tables.table_shape(vocab, dim, devices)


def leaf_length(path: Sequence[str], config: Config, devices: int, stages: int = 1) -> int:
    """Length of the first axis of the leaf at a path."""
    if path[0] in TABLES:
        return devices
    if path[0] != "layers":
        return config.per_layer.dim if config.per_layer and path[0] != "norm" else config.dim
    return count_stack(path, config) * (devices // stages if _is_sharded(path) else 1)


def shard_shape(
    shape: tuple[int, ...], path: Sequence[str], config: Config, devices: int
) -> tuple[int, tuple[int, ...]]:
    """The number of shards of a tensor of a block, one if it is replicated, and the shape of each.

    Args:
        shape: the shape of the tensor in a checkpoint, [out, in] or [out].
        path: the path of its leaf.
        config: the configuration of the whole transformer.
        devices: the number of devices; of each stage, if there are some.
    """
    axis = _axis(path)
    if axis is None:
        return 1, shape
    parts = _count_parts(path, config, devices)
    return devices, (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])


def split_tensor(
    tensor: Shaped[np.ndarray, "..."], path: Sequence[str], config: Config, devices: int
) -> list[Shaped[np.ndarray, "..."]]:
    """The shards of a tensor of a block, which are views of it."""
    axis = _axis(path)
    if axis is None:
        return [tensor]
    parts = np.split(tensor, _count_parts(path, config, devices), axis)
    return [part for part in parts for _ in range(devices // len(parts))]


def _count_parts(path: Sequence[str], config: Config, devices: int) -> int:
    """The number of different shards of a tensor of a block."""
    if path[-2] not in ("k_proj", "v_proj"):
        return devices
    has_own = config.full is not None and path[1] == "full"
    return min(devices, (config.full if has_own else config).kv_heads)  # type: ignore[union-attr]


def _is_sharded(path: Sequence[str]) -> bool:
    return path[0] in TABLES or _axis(path) is not None


def _axis(path: Sequence[str]) -> int | None:
    """The axis along which a tensor of a block is divided; None if it is replicated."""
    *modules, name = path
    if name in _WIDE or (modules and modules[-1] in _BY_OUTPUTS):
        return 0
    return 1 if modules and modules[-1] in _BY_INPUTS and name == "kernel" else None
