"""Plain checkpoints, read with their float32 and float16 tensors rounded to bfloat16."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from df11_jax._files.folder_source import FolderSource
from df11_jax._files.source import Arrangement, Source, TensorInfo
from df11_jax._host_arrays import BFLOAT16
from df11_jax._select import is_castable
from df11_jax.checkpoints._plain import PlainCheckpoint
from df11_jax.checkpoints.detect import find_quantization

_BLOCK = 1 << 18  # elements that are rounded and compared at a time, so that they stay in the cache


class Rounded(NamedTuple):
    """What rounding did to a tensor.

    Attributes:
        weights: the number of its elements.
        changed: the number of those that have another value since; NaNs count as one value.
        infinite: the number of those that were finite, and are infinite since.
    """

    weights: int
    changed: int
    infinite: int


class CastCheckpoint(FolderSource):
    """A plain checkpoint whose float32 and float16 tensors are bfloat16.

    A tensor is rounded when it is read, from the file into what is returned.

    Attributes:
        path: the path of the directory or file.
        tensors: all tensors by name, with the dtypes that they have when they are read.
        casts: the number of tensors that are rounded when they are read.
        rounded: what rounding did to those that have been read, by name.
    """

    format = "plain"

    def __init__(self, source: Source) -> None:
        """Takes the checkpoint as it is.

        Raises:
            ValueError: the checkpoint is not plain, or is quantized.
        """
        if not isinstance(source, PlainCheckpoint):
            raise ValueError(
                f"{source.path}: is a {source.format} checkpoint, and only plain ones are rounded; "
                "take the one that it was made of"
            )
        super().__init__(source.folder)
        if method := find_quantization(source.tensors, source.model_config()):
            raise ValueError(
                f"{source.path}: is quantized ({method}), and its scales would be rounded; get the "
                "model in float32, float16 or bfloat16"
            )
        self._source = source
        self.tensors = {name: _cast_info(info) for name, info in source.tensors.items()}
        self.casts = sum(is_castable(info.numpy_dtype) for info in source.tensors.values())
        self.rounded: dict[str, Rounded] = {}

    def model_config(self) -> dict[str, Any]:
        """The content of the model's config.json, with the dtype that the weights have now."""
        return _cast_config(super().model_config())

    def read(self, name: str) -> np.ndarray:
        """One tensor, rounded to the nearest, ties to even."""
        array = self._source.read(name)
        if not is_castable(self._source.tensors[name].numpy_dtype):
            return array
        rounded, self.rounded[name] = round_to_bfloat16(array)
        return rounded

    def arrangement(self) -> Arrangement:
        """The files of the tensors."""
        return self._source.arrangement()


def round_to_bfloat16(array: np.ndarray) -> tuple[np.ndarray, Rounded]:
    """Rounds to the nearest bfloat16, ties to even, and counts; memory is taken for the result."""
    out = np.empty(array.shape, BFLOAT16)
    flat, flat_out = array.reshape(-1), out.reshape(-1)
    changed = infinite = 0
    for begin in range(0, array.size, _BLOCK):
        before, after = flat[begin : begin + _BLOCK], flat_out[begin : begin + _BLOCK]
        with np.errstate(all="ignore"):  # numpy warns of overflow, which is counted
            after[...] = before
            back = after.astype(np.float32)
        changed += int(np.count_nonzero(back != before)) - int(np.count_nonzero(np.isnan(before)))
        infinite += int(np.count_nonzero(np.isinf(back))) - int(np.count_nonzero(np.isinf(before)))
    return out, Rounded(array.size, changed, infinite)


def _cast_info(info: TensorInfo) -> TensorInfo:
    if not is_castable(info.numpy_dtype):
        return info
    nbytes = BFLOAT16.itemsize * math.prod(info.shape)
    return TensorInfo(info.shape, "BF16", nbytes, nbytes)


def _cast_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that names bfloat16 where it, or that of a part, names another dtype.

    Otherwise vLLM, for one, would make float16 of weights that the configuration calls float32.
    """
    return _cast_dtype(
        {key: _cast_dtype(part) if isinstance(part, dict) else part for key, part in config.items()}
    )


def _cast_dtype(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: "bfloat16"
        if key in ("dtype", "torch_dtype") and value in ("float32", "float16")
        else value
        for key, value in fields.items()
    }
