"""What every format of checkpoint is read as."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from df11_jax._files.safetensors import DTYPES


class TensorInfo(NamedTuple):
    """What a checkpoint's header tells about one tensor.

    Attributes:
        shape: of the tensor that is meant, whatever it is stored as.
        dtype: as safetensors names it: `"BF16"`, `"F32"`.
        nbytes: of that tensor, not compressed.
        stored_nbytes: what it takes in the checkpoint.
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
    """Where tensors come from: a checkpoint, or whatever else has them by name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order in which they are best read."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded, on the host; not to be written to.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it is corrupt; the message names the file and the tensor.
        """


@runtime_checkable
class Source(TensorSource, Protocol):
    """A checkpoint that is read tensor by tensor, whatever its format.

    Opening it reads headers only; `read` takes no more memory than the tensor, and in the
    published format the unit that it is part of.
    """

    @property
    def path(self) -> Path:
        """The directory or file."""

    @property
    def format(self) -> str:
        """`"plain"`, `"native"`, `"published"` or `"orbax"`."""
