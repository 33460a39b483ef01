"""Plain checkpoints: safetensors files with one tensor a weight, as everybody has them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from df11_jax._files.safetensors import TensorFile
from df11_jax._files.source import TensorInfo


class PlainCheckpoint:
    """Tensors as they lie in safetensors files.

    Attributes:
        path: the path of the directory or file.
        tensors: all tensors by name.
    """

    format = "plain"

    def __init__(self, path: Path, files: Mapping[str, TensorFile]) -> None:
        """Takes the files that hold the tensors."""
        self.path = path
        self._files = files
        self.tensors = {}
        for name, file in files.items():
            entry = file.entries[name]
            self.tensors[name] = TensorInfo(entry.shape, entry.dtype, entry.nbytes, entry.nbytes)

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of the mapped file."""
        return self._files[name].array(name)
