"""Shares of a decoder on several devices: which tensors are divided, and where they are cut.

Attention is divided by heads, the MLP by its hidden units, tables by groups of rows. Norms, and
biases of what is summed over the devices, are on all of them. A tensor of blocks that is divided
becomes a stack [devices * layers, ...], the slices of the first device first. Sharded along that
axis, it is on each device a stack [layers, ...], whose slices can be decompressed there alone.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from df11_jax.models import _table
from df11_jax.models._config import Config

# The axis of a mesh.
AXIS = "model"

# Kernels of which each device has some outputs, or some inputs.
_BY_OUTPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_BY_INPUTS = frozenset({"o_proj", "down_proj"})
_TABLES = frozenset({"embed_tokens", "lm_head"})


def share_of(config: Config, devices: int) -> Config:
    """The decoder that each of several devices computes.

    Args:
        config: of the whole decoder.
        devices: how many there are.

    Returns:
        The share's configuration; of one device, `config` itself.

    Raises:
        ValueError: heads or hidden units cannot be divided by the number of devices.
    """
    if devices == 1:
        return config
    sizes = {
        "query heads": config.heads,
        "key-value heads": config.kv_heads,
        "hidden units": config.hidden,
    }
    if wrong := [f"{size} {what}" for what, size in sizes.items() if size % devices]:
        common = math.gcd(*sizes.values())
        possible = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"{' and '.join(wrong)} cannot be divided among {devices} devices: expected "
            f"{' or '.join(possible)}"
        )
    return dataclasses.replace(
        config,
        heads=config.heads // devices,
        kv_heads=config.kv_heads // devices,
        hidden=config.hidden // devices,
        axis=AXIS,
    )


def is_divided(path: Sequence[str]) -> bool:
    """Whether each device has a part of the leaf at a path; else all have all of it."""
    return path[0] in _TABLES or _axis(path) is not None


def table_shape(config: Config, devices: int) -> tuple[int, int, int]:
    """Shape of embedding and output head, which have as many groups for each device."""
    groups, rows, dim = _table.table_shape(config.vocab, config.dim)
    return -(-groups // devices) * devices, rows, dim


def leaf_length(path: Sequence[str], config: Config, devices: int) -> int:
    """Length of the first axis of the leaf at a path."""
    if path[0] in _TABLES:
        return table_shape(config, devices)[0]
    if path[0] != "layers":
        return config.dim
    return config.layers * (devices if is_divided(path) else 1)


def part_shape(
    shape: tuple[int, ...], path: Sequence[str], devices: int
) -> tuple[int, tuple[int, ...]]:
    """How many different parts there are of a tensor of a block, and the shape of each.

    Args:
        shape: of the tensor as checkpoints have it, [out, in] or [out].
        path: of its leaf.
        devices: how many there are.
    """
    axis = _axis(path)
    if axis is None:
        return 1, shape
    return devices, (*shape[:axis], shape[axis] // devices, *shape[axis + 1 :])


def cut(
    tensor: Shaped[np.ndarray, "..."], path: Sequence[str], devices: int
) -> list[Shaped[np.ndarray, "..."]]:
    """The parts of a tensor of a block, which are views of it."""
    axis = _axis(path)
    return [tensor] if axis is None else np.split(tensor, devices, axis)


def _axis(path: Sequence[str]) -> int | None:
    """The axis along which a tensor of a block is cut; None if it is not."""
    *modules, kind = path
    if modules and modules[-1] in _BY_OUTPUTS:
        return 0
    return 1 if modules and modules[-1] in _BY_INPUTS and kind == "kernel" else None
