"""Parameters on devices: where each leaf is put, and over which mesh parameters are divided."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name
from df11_jax._placement import on_mesh
from df11_jax.models._config import Config
from df11_jax.models._processes import put_shards, spans_processes
from df11_jax.models._sharding import (
    ALL_AXES,
    AXIS,
    STAGES,
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
        stages: the number of stages that these are divided into.
        local: which of them are devices of this process.
    """

    def __init__(self, config: Config, devices: Devices | None, stages: int = 1) -> None:
        """Finds the devices.

        Args:
            config: the configuration of the transformer.
            devices: the devices to divide it over, or their number; None for the default device
                alone, or if there are several processes, for all devices of all of them.
            stages: the number of stages that layers and devices are divided into.

        Raises:
            ValueError: there are not as many devices, some are named twice, they are those of some
                of several processes, or the transformer cannot be divided among them.
        """
        self._devices = _find_devices(devices)
        self.count = len(self._devices) or 1
        self.stages = stages
        here = jax.process_index() if jax.process_count() > 1 else None
        self.local = [
            i for i, device in enumerate(self._devices) if here in (None, device.process_index)
        ] or [0]
        shard_config(config, self.count, stages)
        self._mesh = None
        if self.count > 1:
            self._mesh = Mesh(np.array(self._devices).reshape(stages, -1), (STAGES, AXIS))

    def of(self, path: Sequence[str]) -> DeviceOrSharding:
        """Where `jax.device_put` puts the leaf at a path."""
        if self._mesh is None:
            return self._devices[0] if self._devices else None
        return NamedSharding(self._mesh, partition_spec(path))

    @property
    def local_stages(self) -> list[int]:
        """The stages of which this process has devices."""
        return sorted({device * self.stages // self.count for device in self.local})

    def parts(self, path: Sequence[str]) -> tuple[int, list[int]]:
        """The number of parts of the leaf at a path, and which of them this process has."""
        spec = partition_spec(path)
        if spec == PartitionSpec(STAGES):
            return self.stages, self.local_stages
        if not spec:
            return 1, [0]
        size = self.count // self.stages
        return self.count, sorted(i % size * self.stages + i // size for i in self.local)

    def part_shape(self, path: Sequence[str], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what this process has of the leaf at a path: slices of its own devices."""
        if not partition_spec(path):
            return shape
        count, here = self.parts(path)
        return (shape[0] // count * len(here), *shape[1:])

    def part(
        self, path: Sequence[str], array: Shaped[np.ndarray, "..."]
    ) -> Shaped[np.ndarray, "..."]:
        """What this process has of the leaf at a path."""
        count, here = self.parts(path)
        if len(here) == count:
            return array
        shards = np.split(array, count)
        return np.concatenate([shards[i] for i in here])

    def put(self, path: Sequence[str], leaf: Array | DF11Array) -> Array | DF11Array:
        """Puts the leaf at a path, all of which this process has, onto its devices."""
        where = self.of(path)
        if not spans_processes(where):
            return jax.device_put(leaf, where)
        return jax.tree.map(lambda x: put_shards(self.part(path, np.asarray(x)), where), leaf)


def place_params(params: Params, config: Config, devices: Devices, *, stages: int = 1) -> Params:
    """Puts divided parameters onto devices, such as those that were saved and loaded again.

    Args:
        params: parameters that `load_params` divided for as many devices, wherever they are now.
        config: the configuration of the transformer.
        devices: the devices to put them onto, or their number; if they are those of several
            processes, each process has all of the parameters, and puts its part.
        stages: the number of stages to divide layers and devices into, whatever it was before.

    Returns:
        Parameters for `generate`.

    Raises:
        ValueError: the parameters were not divided for as many devices, there are not as many, or
            the transformer cannot be divided among them.
    """
    target = ParamDevices(config, devices, stages)

    def put(keys: Any, leaf: Any) -> Any:
        path = path_name(keys).split("/")
        expected = leaf_length(path, config, target.count, stages)
        if leaf.shape[0] != expected:
            raise ValueError(
                f"{'/'.join(path)}: has {leaf.shape[0]} slices, expected {expected} for "
                f"{target.count} devices: load_params divides them, also those that were saved"
            )
        return target.put(path, leaf)

    return jax.tree.map_with_path(put, params, is_leaf=is_df11)


def find_mesh(params: Params) -> Mesh | None:
    """The mesh that parameters are divided over; None if they are not.

    Args:
        params: arrays or their shapes.

    Raises:
        ValueError: the parameters were divided for several devices, and are not on as many.
    """
    sharding, mesh = _named_sharding(params), None
    if sharding is not None and sharding.spec[:1] == (ALL_AXES,):
        assert isinstance(sharding.mesh, Mesh)
        mesh = sharding.mesh
    # Each device has a part of the embedding, also where stages have no more than one device.
    count, shards = mesh.size if mesh else 1, params["embed_tokens"].shape[0]
    if shards != count:
        raise ValueError(
            f"params are divided for {shards} devices, but on {count}: see models.place_params"
        )
    return mesh


def on_own_mesh(params: Params) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are where parameters are, whatever mesh the caller has set.

    Under that, each of its devices would get all parameters that are on a single device, in each
    call; and those that are divided are on a mesh of their own.
    """
    sharding = _named_sharding(params)
    mesh = None if sharding is None else sharding.mesh
    return on_mesh(mesh if isinstance(mesh, Mesh) else None)


def _named_sharding(params: Params) -> NamedSharding | None:
    """The sharding of the first of the parameters, if it is one on a mesh."""
    sharding = getattr(jax.tree.leaves(params["embed_tokens"])[0], "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _find_devices(devices: Devices | None) -> list[jax.Device]:
    """The devices; none for the default device."""
    processes = jax.process_count()
    if processes > 1 and (devices is None or isinstance(devices, int)):
        if devices not in (None, jax.device_count()):
            raise ValueError(
                f"devices is {devices}, expected {jax.device_count()}, which is how many the "
                f"{processes} processes have, or a list of jax.local_devices()"
            )
        return jax.devices()
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
    owners = {device.process_index for device in devices}
    if processes > 1 and owners != {jax.process_index()} and len(owners) < processes:
        raise ValueError(
            f"devices are those of processes {sorted(owners)}, expected devices of all {processes} "
            f"processes, or of process {jax.process_index()} alone"
        )
    return list(devices)
