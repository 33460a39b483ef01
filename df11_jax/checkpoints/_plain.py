"""Plain checkpoints: safetensors files with one tensor a weight, as everybody has them."""

from collections.abc import Mapping

import numpy as np

from df11_jax._files.folder import Folder
from df11_jax._files.folder_source import FolderSource
from df11_jax._files.safetensors import TensorFile
from df11_jax._files.source import Arrangement, TensorInfo


class PlainCheckpoint(FolderSource):
    """Tensors as they lie in safetensors files.

    Attributes:
        path: the path of the directory or file.
        tensors: all tensors by name.
    """

    format = "plain"

    def __init__(self, folder: Folder, files: Mapping[str, TensorFile]) -> None:
        """Takes the files that hold the tensors."""
        super().__init__(folder)
        self._files = files
        self.tensors = {}
        for name, file in files.items():
            entry = file.entries[name]
            self.tensors[name] = TensorInfo(entry.shape, entry.dtype, entry.nbytes, entry.nbytes)

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of the mapped file; its bytes if numpy has no such dtype."""
        return self._files[name].array(name)

    def arrangement(self) -> Arrangement:
        """The files of the tensors."""
        return self._arrange(self._files, lambda file: file.metadata)
