"""Pytrees, read tensor by tensor like checkpoints."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import decompress
from df11_jax._files.safetensors import dtype_name
from df11_jax._files.source import TensorInfo
from df11_jax._host_arrays import to_host


class PyTreeSource:
    """A pytree, read like a checkpoint.

    Attributes:
        tensors: its leaves by their paths, joined by dots.
    """

    def __init__(self, params: PyTree) -> None:
        """Takes the pytree.

        Raises:
            ValueError: a leaf is no array or cannot be stored, or two leaves have the same name.
        """
        self._leaves: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=is_df11):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            if name in self._leaves:
                raise ValueError(f"{name}: two leaves have this name")
            if not isinstance(leaf, (DF11Array, jax.Array, np.ndarray, np.generic)):
                raise ValueError(f"{name}: is a {type(leaf).__name__}, expected an array")
            dtype = dtype_name(name, leaf.dtype)
            self._leaves[name] = leaf
            self.tensors[name] = TensorInfo(leaf.shape, dtype, leaf.nbytes, leaf.nbytes)

    def read(self, name: str) -> np.ndarray:
        """One leaf, decoded, on the host."""
        leaf = self._leaves[name]
        if isinstance(leaf, DF11Array):
            leaf = decompress(leaf)
        return to_host(leaf)
