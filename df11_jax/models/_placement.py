"""Which devices parameters go to, and what of them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from df11_jax._array import is_df11
from df11_jax._decode import path_name
from df11_jax.models._config import Config
from df11_jax.models._shares import AXIS, is_divided, leaf_length, share_of
from df11_jax.models._transformer import Params

Devices = int | Sequence[jax.Device]


class Placement:
    """Where the leaves of a decoder's parameters are.

    Attributes:
        count: of devices.
    """

    def __init__(self, config: Config, devices: Devices | None) -> None:
        """Finds the devices.

        Args:
            config: of the decoder.
            devices: to divide it over, or how many of this host; None for the default device.

        Raises:
            ValueError: there are not as many, some are named twice, or the decoder cannot be
                divided among them.
        """
        self._devices = _find(devices)
        self.count = len(self._devices) or 1
        share_of(config, self.count)
        self._mesh = Mesh(np.array(self._devices), (AXIS,)) if self.count > 1 else None

    def of(self, path: Sequence[str]) -> jax.Device | jax.sharding.Sharding | None:
        """The place of the leaf at a path, for `jax.device_put`."""
        if self._mesh is None:
            return self._devices[0] if self._devices else None
        return NamedSharding(self._mesh, P(AXIS) if is_divided(path) else P())


def place_params(params: Params, config: Config, devices: Devices) -> Params:
    """Puts divided parameters onto devices, such as those that were saved and loaded again.

    Args:
        params: leaves that `load_params` returned for as many devices, wherever they are now.
        config: of the decoder.
        devices: to divide them over, or how many of this host.

    Returns:
        Parameters for `generate`.

    Raises:
        ValueError: they were not divided for as many devices; or as for `load_params`.
    """
    place = Placement(config, devices)

    def put(keys: Any, leaf: Any) -> Any:
        path = path_name(keys).split("/")
        expected = leaf_length(path, config, place.count)
        if leaf.shape[0] != expected:
            raise ValueError(
                f"{'/'.join(path)}: has {leaf.shape[0]} slices, expected {expected} for "
                f"{place.count} devices: load_params divides parameters when it loads them"
            )
        return jax.device_put(leaf, place.of(path))

    return jax.tree.map_with_path(put, params, is_leaf=is_df11)


def _find(devices: Devices | None) -> list[jax.Device]:
    """The devices; none for the default device."""
    if devices is None or devices == 1:
        return []
    if isinstance(devices, int):
        here = jax.local_devices()
        if not 1 < devices <= len(here):
            raise ValueError(
                f"devices is {devices}, expected from 1 to {len(here)}: there are as many here "
                f"({here[0].device_kind})"
            )
        return here[:devices]
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(f"devices is {devices}, expected one device or several different ones")
    return list(devices)
