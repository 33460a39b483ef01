"""One leaf of a checkpoint, loaded."""

from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from df11_jax._array import DF11Array, is_df11
from df11_jax._compress import compress_leaf
from df11_jax._files.source import Source, TensorSource
from df11_jax._layout import Layout
from df11_jax._placement import on_cpu, place
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

    def layout(self, name: str) -> Layout | None:
        """The layout of the slices of a leaf; None if it is stored plain."""

    def view(self, name: str) -> DF11Array | np.ndarray:
        """One leaf as it is stored, in arrays on the host that are not to be written to.

        They may be those of mapped files, of which no more is read than is touched. What is damaged
        is found when it is decoded.

        Raises:
            ValueError: the leaf is corrupt.
        """

    def load_shards(
        self, name: str, where: NamedSharding, *, verify: bool = True
    ) -> DF11Array | Array:
        """One leaf as it is stored, on several devices, each of which gets its shard only.

        If these are those of several processes, each has to call this for the same leaves in the
        same order.

        Args:
            name: the name of the leaf.
            where: its sharding, along axes of the stack if it is compressed.
            verify: see `load`.

        Raises:
            ValueError: the leaf is corrupt.
        """


def load_leaf(
    source: TensorSource,
    name: str,
    where: jax.Device | jax.sharding.Sharding | None,
    *,
    verify: bool = True,
) -> DF11Array | Array | np.ndarray:
    """One leaf, as it is stored, or compressed if the format stores no leaves.

    Args:
        source: the checkpoint.
        name: the name of the leaf.
        where: the device or sharding that the leaf is to have; None for the default device.
        verify: see `load`.

    Raises:
        ValueError: the leaf is corrupt, or cannot be divided as `where` says.
    """
    if where is None:
        return _read_leaf(source, name, where, verify)
    try:
        with on_cpu():
            leaf = _read_leaf(source, name, where, verify)
            # Arrays of types that jax lacks are on the host; `device_put` would lose bits of them.
            return leaf if isinstance(leaf, np.ndarray) else place(leaf, where, name)
    except Exception as error:
        path = f"{source.path}: " if isinstance(source, Source) else ""
        error.add_note(f"df11_jax: {path}while placing the leaf {name}")
        raise


def _read_leaf(
    source: TensorSource,
    name: str,
    where: jax.Device | jax.sharding.Sharding | None,
    verify: bool,
) -> DF11Array | Array | np.ndarray:
    if isinstance(source, LeafSource):
        return source.load(name, verify=verify)
    array = source.read(name)
    selection = Selection()
    leaf = compress_leaf(name, array, selection, where) if selection.has(name, array) else array
    return leaf if is_df11(leaf) else to_device(array)
