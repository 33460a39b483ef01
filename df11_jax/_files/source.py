"""The protocols by which checkpoints of all formats are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from df11_jax._files.safetensors import DTYPES


class TensorInfo(NamedTuple):
    """The description of one tensor in a checkpoint's header.

    Attributes:
        shape: the shape of the tensor, whatever it is stored as.
        dtype: the name of its dtype in safetensors files: `"BF16"`, `"F32"`.
        nbytes: the bytes of the tensor, not compressed.
        stored_nbytes: the bytes that it takes in the checkpoint.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    stored_nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype as numpy knows it; None if numpy does not."""
        return DTYPES.get(self.dtype)


class TensorSource(Protocol):
    """Tensors by name: a checkpoint, or anything else that has some."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order in which they are best read."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded, on the host; not to be written to.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the tensor is corrupt; the message names the file and the tensor.
        """


@runtime_checkable
class Source(TensorSource, Protocol):
    """A checkpoint that is read tensor by tensor, whatever its format.

    Opening it reads headers only; `read` takes the memory of one tensor, or in the published
    format that of the unit of which the tensor is a part.
    """

    @property
    def path(self) -> Path:
        """The directory or file."""

    @property
    def format(self) -> str:
        """`"plain"`, `"native"`, `"published"` or `"orbax"`."""
