"""Orbax checkpoints of parameters, for the command line and `load`."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from df11_jax._array import DF11Array
from df11_jax._files.safetensors import DTYPE_NAMES
from df11_jax._files.source import Source, TensorInfo
from df11_jax._host_arrays import cpu_device
from df11_jax._host_codec import decode
from df11_jax.checkpoints._native_format import to_device
from df11_jax.checkpoints._pytree import load
from df11_jax.orbax import DF11CheckpointHandler, DF11Save
from df11_jax.orbax._manifest import Leaf
from df11_jax.orbax._restore import read_leaf
from df11_jax.orbax._stored import open_stored


class OrbaxCheckpoint:
    """A checkpoint of one item: the folder that Orbax puts its `_METADATA` in.

    Attributes:
        path: of that folder.
        tensors: all leaves by path, compressed ones as the tensors that they stand for.
    """

    format = "orbax"

    def __init__(self, path: Path) -> None:
        """Reads the metadata.

        Raises:
            ValueError: the metadata is damaged, of an unknown version, or has leaves that are no
                arrays.
        """
        self.path = path
        self._stored = open_stored(path.resolve())
        self._leaves = {leaf.path: leaf for leaf in self._stored.manifest.leaves}
        self.tensors = {name: self._info(leaf) for name, leaf in self._leaves.items()}

    def read(self, name: str) -> np.ndarray:
        """One leaf, decoded, on the host."""
        value = read_leaf(self._stored, self._leaves[name])
        if not isinstance(value, DF11Array):
            return np.asarray(value)
        payload = [np.asarray(part) for part in value.payload]
        return decode(payload, value.slice_shape, f"{self.path}: {name}")

    def load(self, name: str) -> DF11Array | Array | np.ndarray:
        """One leaf as it is stored, on the default device."""
        return jax.tree.map(to_device, read_leaf(self._stored, self._leaves[name]))

    def _info(self, leaf: Leaf) -> TensorInfo:
        dtype: Any = None if leaf.dtype is None or leaf.is_key else np.dtype(leaf.dtype)
        if dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{self.path}: {leaf.path}: is {leaf.dtype or 'a text'}, and only arrays of "
                "numbers are read here; df11_jax.orbax reads all that Orbax does"
            )
        nbytes = math.prod(leaf.shape) * dtype.itemsize
        stored = sum(
            math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in leaf.arrays
        )
        return TensorInfo(leaf.shape, DTYPE_NAMES[dtype], nbytes, stored)


def write_orbax(source: Source, path: Path, *, progress: bool = False) -> None:
    """Writes a checkpoint that `df11_jax.orbax.DF11Restore` restores.

    Compressed, all tensors are in memory at once. Orbax gives the folder its name when it is
    complete; after an interruption, all is to be done again.

    Args:
        source: what to compress.
        path: of the new folder.
        progress: show a progress bar.

    Raises:
        FileExistsError: there is something at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt.
    """
    import orbax.checkpoint as ocp

    if path.exists():
        raise FileExistsError(f"{path}: exists already; expected a new directory")
    with jax.default_device(cpu_device()):
        params = load(source, progress=progress)
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(path.resolve(), args=DF11Save(params))
