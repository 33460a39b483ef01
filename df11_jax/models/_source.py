"""What parameters are loaded from."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(Protocol):
    """What is known about a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """Its dtype, as safetensors names it, such as `"BF16"`."""


class Shape(NamedTuple):
    """The plainest `TensorInfo`."""

    shape: tuple[int, ...]
    dtype: str


class Source(Protocol):
    """Where tensors come from: a checkpoint, or whatever else has them by name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order in which they are best read."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, on the host; not to be written to."""
