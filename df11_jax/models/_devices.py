"""Parameters on devices: where each leaf is put, and over which mesh parameters are divided."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from df11_jax._array import is_df11
from df11_jax._decode import path_name
from df11_jax.models._config import Config
from df11_jax.models._experts import EXPERTS
from df11_jax.models._sharding import (
    AXIS,
    DeviceOrSharding,
    leaf_length,
    partition_spec,
    shard_config,
)
from df11_jax.models._transformer import Params

Devices = int | Sequence[jax.Device]


class ParamDevices:
    """The devices of each leaf of a transformer's parameters.

    Attributes:
        count: the number of devices.
    """

    def __init__(self, config: Config, devices: Devices | None) -> None:
        """Finds the devices.

        Args:
            config: the configuration of the transformer.
            devices: the devices to divide it over, or their number, for devices of this host; None
                for the default device alone.

        Raises:
            ValueError: there are not as many devices, some are named twice, or the transformer
                cannot be divided among them.
        """
        self._devices = _find_devices(devices)
        self.count = len(self._devices) or 1
        shard_config(config, self.count)
        self._mesh = Mesh(np.array(self._devices), (AXIS,)) if self.count > 1 else None

    def of(self, path: Sequence[str]) -> DeviceOrSharding:
        """Where `jax.device_put` puts the leaf at a path."""
        if self._mesh is None:
            return self._devices[0] if self._devices else None
        return NamedSharding(self._mesh, partition_spec(path))


def place_params(params: Params, config: Config, devices: Devices) -> Params:
    """Puts divided parameters onto devices, such as those that were saved and loaded again.

    Args:
        params: parameters that `load_params` divided for as many devices, wherever they are now.
        config: the configuration of the transformer.
        devices: the devices to put them onto, or their number, for devices of this host.

    Returns:
        Parameters for `generate`.

    Raises:
        ValueError: the parameters were not divided for as many devices, there are not as many, or
            the transformer cannot be divided among them.
    """
    target = ParamDevices(config, devices)

    def put(keys: Any, leaf: Any) -> Any:
        path = path_name(keys).split("/")
        expected = leaf_length(path, config, target.count)
        if leaf.shape[0] != expected:
            raise ValueError(
                f"{'/'.join(path)}: has {leaf.shape[0]} slices, expected {expected} for "
                f"{target.count} devices: load_params divides parameters when it loads them"
            )
        return jax.device_put(leaf, target.of(path))

    return jax.tree.map_with_path(put, params, is_leaf=is_df11)


def find_mesh(params: Params) -> Mesh | None:
    """The mesh that parameters are divided over; None if they are not.

    Args:
        params: arrays or their shapes.

    Raises:
        ValueError: the parameters were divided for several devices, and are not on as many.
    """
    sharding = getattr(jax.tree.leaves(params["embed_tokens"])[0], "sharding", None)
    mesh: Mesh | None = None
    if isinstance(sharding, NamedSharding) and sharding.spec[:1] == (AXIS,):
        assert isinstance(sharding.mesh, Mesh)
        mesh = sharding.mesh
    count, shards = mesh.size if mesh else 1, _count_shards(params)
    if shards != count:
        raise ValueError(
            f"params are divided for {shards} devices, but on {count}: see models.place_params"
        )
    return mesh


def _find_devices(devices: Devices | None) -> list[jax.Device]:
    """The devices; none for the default device."""
    if devices is None or devices == 1:
        return []
    if isinstance(devices, int):
        here = jax.local_devices()
        if not 1 < devices <= len(here):
            most = f"1 to {len(here)}" if len(here) > 1 else "1"
            raise ValueError(
                f"devices is {devices}, expected {most}, which is how many there are here "
                f"({here[0].device_kind})"
            )
        return here[:devices]
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(f"devices is {devices}, expected one device or several different ones")
    return list(devices)


def _count_shards(params: Params) -> int:
    """The number of devices that parameters were divided for, wherever they are."""
    block = params["layers"]
    if "input_layernorm" not in block:  # a stack for each type of layers
        block = next(iter(block.values()))
    layers = block["input_layernorm"]["scale"].shape[0]
    mlp = block["mlp"].get(EXPERTS, block["mlp"])
    return mlp["down_proj"]["kernel"].shape[0] // layers if layers else 1
