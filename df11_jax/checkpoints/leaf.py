"""One leaf of a checkpoint, loaded."""

from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

from df11_jax._array import DF11Array, is_df11
from df11_jax._compress import compress_leaf
from df11_jax._files.source import Source, TensorSource
from df11_jax._host_arrays import cpu_device
from df11_jax._select import Selection
from df11_jax.checkpoints._native_format import to_device


@runtime_checkable
class LeafSource(Protocol):
    """A checkpoint of a format that stores leaves as this library has them in memory."""

    def load(self, name: str, *, verify: bool = True) -> DF11Array | Array | np.ndarray:
        """One leaf as it is stored, on the default device.

        Args:
            name: the name of the leaf.
            verify: whether to check all of it, other than what it takes to read it.

        Raises:
            ValueError: the leaf is corrupt.
        """


def load_leaf(
    source: TensorSource,
    name: str,
    device: jax.Device | jax.sharding.Sharding | None,
    *,
    verify: bool = True,
) -> DF11Array | Array | np.ndarray:
    """One leaf, as it is stored, or compressed if the format stores no leaves.

    Args:
        source: the checkpoint.
        name: the name of the leaf.
        device: the device or sharding of all its arrays; None for the default device.
        verify: see `load`.

    Raises:
        ValueError: the leaf is corrupt, or `device` does not suit an array.
    """
    if device is None:
        return _read_leaf(source, name, verify)
    with jax.default_device(cpu_device()):
        leaf = _read_leaf(source, name, verify)
    try:
        # Arrays of types that jax lacks are on the host; `device_put` would lose bits of them.
        return jax.tree.map(
            lambda array: jax.device_put(array, device) if isinstance(array, jax.Array) else array,
            leaf,
        )
    except Exception as error:
        where = f"{source.path}: " if isinstance(source, Source) else ""
        error.add_note(f"df11_jax: {where}while placing the leaf {name}")
        raise


def _read_leaf(source: TensorSource, name: str, verify: bool) -> DF11Array | Array | np.ndarray:
    if isinstance(source, LeafSource):
        return source.load(name, verify=verify)
    array = source.read(name)
    selection = Selection()
    leaf = compress_leaf(name, array, selection) if selection.has(name, array) else array
    return leaf if is_df11(leaf) else to_device(array)
