"""Orbax checkpoints of parameters, read like those of other formats."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from df11_jax._array import DF11Array
from df11_jax._files.safetensors import DTYPE_NAMES
from df11_jax._files.source import TensorInfo
from df11_jax._host_codec import decode
from df11_jax.checkpoints._native_format import to_device
from df11_jax.orbax.items import LeafReader, StoredLeaf


class OrbaxCheckpoint:
    """A checkpoint of one item: the folder in which Orbax puts its `_METADATA`.

    Attributes:
        path: the path of that folder.
        tensors: all leaves by path, as they are without compression.
    """

    format = "orbax"

    def __init__(self, path: Path) -> None:
        """Reads the metadata.

        Raises:
            ValueError: the metadata is damaged, of an unknown version, or has leaves that are no
                arrays.
        """
        self.path = path
        self._reader = LeafReader(path.resolve())
        self.tensors = {name: self._info(leaf) for name, leaf in self._reader.leaves.items()}

    def read(self, name: str) -> np.ndarray:
        """One leaf, decoded, on the host."""
        value = self._reader.read(name)
        if not isinstance(value, DF11Array):
            return np.asarray(value)
        payload = [np.asarray(part) for part in value.payload]
        return decode(payload, value.layout, f"{self.path}: {name}")

    def load(self, name: str) -> DF11Array | Array | np.ndarray:
        """One leaf as it is stored, on the default device."""
        return jax.tree.map(to_device, self._reader.read(name))

    def _info(self, leaf: StoredLeaf) -> TensorInfo:
        dtype: Any = None if leaf.dtype is None or leaf.is_key else np.dtype(leaf.dtype)
        if dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{self.path}: {leaf.path}: is {leaf.dtype or 'a text'}, and only arrays of "
                "numbers are read here; df11_jax.orbax reads all that Orbax does"
            )
        return TensorInfo(leaf.shape, DTYPE_NAMES[dtype], leaf.nbytes, leaf.stored_nbytes)
