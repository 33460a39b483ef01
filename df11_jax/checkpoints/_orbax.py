"""Orbax checkpoints of parameters, read like those of other formats."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from df11_jax._array import DF11Array
from df11_jax._files.directory import read_json
from df11_jax._files.file_stats import file_stats
from df11_jax._files.folder import CONFIG
from df11_jax._files.safetensors import DTYPE_NAMES
from df11_jax._files.source import TensorInfo, changed_files, source_changed
from df11_jax._host_codec import decode
from df11_jax._layout import Layout
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
        self._opened = file_stats(path)
        self._reader = LeafReader(path.resolve())
        self.tensors = {name: self._info(leaf) for name, leaf in self._reader.leaves.items()}

    def read(self, name: str) -> np.ndarray:
        """One leaf, decoded, on the host."""
        value = self._reader.read(name)
        if not isinstance(value, DF11Array):
            return np.asarray(value)
        payload = [np.asarray(part) for part in value.payload]
        return decode(payload, value.layout, f"{self.path}: {name}")

    def load(self, name: str, *, verify: bool = True) -> DF11Array | Array | np.ndarray:
        """One leaf as it is stored, on the default device; always verified.

        A number of Python, such as the step of a train state, is an array, as it is when it comes
        out of a native checkpoint.
        """
        return jax.tree.map(to_device, self.view(name))

    def layout(self, name: str) -> Layout | None:
        """The layout of the slices of a leaf; None if it is stored plain."""
        return self._reader.leaves[name].layout

    def view(self, name: str) -> DF11Array | np.ndarray:
        """One leaf as it is stored, which is read as a whole; always verified."""
        return jax.tree.map(np.asarray, self._reader.read(name))

    def load_shards(
        self, name: str, where: NamedSharding, *, verify: bool = True
    ) -> DF11Array | Array:
        """One leaf as it is stored, of which each process reads its shards; always verified."""
        return self._reader.read_onto(name, where)

    def model_config(self) -> dict[str, Any]:
        """The content of the model's config.json, if somebody has put one into the folder."""
        config = self.path / CONFIG
        return read_json(config) if config.exists() else {}

    def arrangement(self) -> None:
        """The files of the tensors, which do not lie in safetensors files."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """What tells the files that were opened from others, by their paths in the folder."""
        return self._opened

    def check_current(self) -> None:
        """Checks that no file was written or replaced since the checkpoint was opened.

        Raises:
            ValueError: one was; the message names some.
        """
        if changed := changed_files(self._opened, self._reader.fingerprint()):
            raise source_changed(self.path, changed)

    def check_unchanged(self) -> None:
        """The same: Orbax opens files by their paths, so that what was read may be a mixture."""
        self.check_current()

    def _info(self, leaf: StoredLeaf) -> TensorInfo:
        dtype: Any = None if leaf.dtype is None or leaf.is_key else np.dtype(leaf.dtype)
        if dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{self.path}: {leaf.path}: is {leaf.dtype or 'a text'}, and only arrays of "
                "numbers are read here; df11_jax.orbax reads all that Orbax does"
            )
        return TensorInfo(leaf.shape, DTYPE_NAMES[dtype], leaf.nbytes, leaf.stored_nbytes)
