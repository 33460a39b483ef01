"""Tensor parallelism: which tensors of a transformer are sharded, and along which axis.

Attention is divided by heads, the MLP and each expert by its hidden units, embedding and output
head by groups of rows. If there are fewer key-value heads than devices, several devices have the
same one. Norms, routers, and biases that are added after a sum over the devices, are replicated. A
tensor of the blocks that is sharded becomes a stack [devices * layers, ...] in which the slices of
the first device come first. Sharded along this axis, it is a stack [layers, ...] on each device,
which can decompress the slices by itself.
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

# The name of the axis of a mesh.
AXIS = "model"

# Where `jax.device_put` puts an array; None for the default device.
DeviceOrSharding: TypeAlias = jax.Device | jax.sharding.Sharding | None

# Kernels that are divided by their outputs, and those that are divided by their inputs.
_BY_OUTPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_BY_INPUTS = frozenset({"o_proj", "down_proj"})
TABLES = frozenset({"embed_tokens", "lm_head"})


def shard_config(config: Config, devices: int) -> Config:
    """The configuration of the part of a transformer that one of several devices computes.

    Args:
        config: the configuration of the whole transformer.
        devices: the number of devices.

    Returns:
        The configuration of a shard; for one device, `config` itself.

    Raises:
        ValueError: heads or hidden units cannot be divided by the number of devices.
    """
    if devices == 1:
        return config
    heads, kv_heads = config.heads, config.kv_heads
    shared_hidden = config.experts.shared_hidden
    hidden = math.gcd(config.hidden, shared_hidden)

    def can_share(count: int) -> bool:
        return kv_heads % count == 0 or count % kv_heads == 0

    wrong = {
        f"{heads} query heads": heads % devices,
        f"{kv_heads} key-value heads": not can_share(devices),
        f"{hidden} hidden units": hidden % devices,
    }
    if any(wrong.values()):
        common = math.gcd(heads, hidden)
        possible = [str(n) for n in range(1, common + 1) if common % n == 0 and can_share(n)]
        raise ValueError(
            f"{' and '.join(what for what in wrong if wrong[what])} cannot be divided among "
            f"{devices} devices: expected {' or '.join(possible)}"
        )
    return dataclasses.replace(
        config,
        heads=heads // devices,
        kv_heads=kv_heads // _count_parts("k_proj", config, devices),
        hidden=config.hidden // devices,
        experts=dataclasses.replace(config.experts, shared_hidden=shared_hidden // devices),
        axis=AXIS,
    )


def partition_spec(path: Sequence[str]) -> PartitionSpec:
    """The sharding of the leaf at a path: along its first axis, or replicated."""
    return PartitionSpec(AXIS) if _is_sharded(path) else PartitionSpec()


def table_shape(config: Config, devices: int) -> tuple[int, int, int]:
    """Shape of embedding and output head, padded to an equal number of groups on each device."""
    groups, rows, dim = tables.table_shape(config.vocab, config.dim)
    return -(-groups // devices) * devices, rows, dim


def leaf_length(path: Sequence[str], config: Config, devices: int) -> int:
    """Length of the first axis of the leaf at a path."""
    if path[0] in TABLES:
        return table_shape(config, devices)[0]
    if path[0] != "layers":
        return config.dim
    return config.layers * (devices if _is_sharded(path) else 1)


def shard_shape(
    shape: tuple[int, ...], path: Sequence[str], config: Config, devices: int
) -> tuple[int, tuple[int, ...]]:
    """The number of shards of a tensor of a block, one if it is replicated, and the shape of each.

    Args:
        shape: the shape of the tensor in a checkpoint, [out, in] or [out].
        path: the path of its leaf.
        config: the configuration of the whole transformer.
        devices: the number of devices.
    """
    axis = _axis(path)
    if axis is None:
        return 1, shape
    parts = _count_parts(path[-2], config, devices)
    return devices, (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])


def split_tensor(
    tensor: Shaped[np.ndarray, "..."], path: Sequence[str], config: Config, devices: int
) -> list[Shaped[np.ndarray, "..."]]:
    """The shards of a tensor of a block, which are views of it."""
    axis = _axis(path)
    if axis is None:
        return [tensor]
    parts = np.split(tensor, _count_parts(path[-2], config, devices), axis)
    return [part for part in parts for _ in range(devices // len(parts))]


def _count_parts(module: str, config: Config, devices: int) -> int:
    """The number of different shards of the tensors of a module."""
    return min(devices, config.kv_heads) if module in ("k_proj", "v_proj") else devices


def _is_sharded(path: Sequence[str]) -> bool:
    return path[0] in TABLES or _axis(path) is not None


def _axis(path: Sequence[str]) -> int | None:
    """The axis along which a tensor of a block is divided; None if it is replicated."""
    *modules, name = path
    if modules and modules[-1] in _BY_OUTPUTS:
        return 0
    return 1 if modules and modules[-1] in _BY_INPUTS and name == "kernel" else None
