"""The shapes of a unit's tensors in the model, which the unit does not store."""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from df11_jax._brief import brief
from df11_jax._files.directory import read_index
from df11_jax._files.folder import Folder, is_index

Shapes = Mapping[str, Sequence[int]] | str | os.PathLike[str]


def read_shapes(shapes: Shapes | None) -> dict[str, tuple[int, ...]]:
    """Reads shapes by tensor name.

    Args:
        shapes: the shapes, or the original model: its safetensors file, index, or directory. Only
            headers are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is invalid, or a shape is invalid.
    """
    if shapes is None:
        return {}
    if isinstance(shapes, Mapping):
        return {name: _as_shape(name, shape) for name, shape in shapes.items()}
    path = Path(shapes)
    if is_index(path.name):
        folder = Folder(path.parent)
        files = list(dict.fromkeys(read_index(folder, path.name).values()))
    else:
        folder = Folder(path)
        files = folder.tensor_files
    if not files:
        raise ValueError(f"shapes: {path}: there are no *.safetensors files in it")
    headers = (folder.tensors(file).entries for file in files)
    return {name: entry.shape for entries in headers for name, entry in entries.items()}


def _as_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(map(operator.index, shape))
    except TypeError:
        dims = (-1,)
    if min(dims, default=0) < 0:
        raise ValueError(f"shapes: {name}: {brief(shape)} is not a shape")
    return dims


def check_shape(shape: Sequence[int], size: int, where: str) -> None:
    """Checks that a shape has as many elements as the unit has for the tensor.

    Raises:
        ValueError: the shape has another number of elements.
    """
    if math.prod(shape) != size:
        raise ValueError(
            f"{where}: its shape in the model is {list(shape)}, which is {math.prod(shape)} "
            f"elements, but the unit has {size} for it; pass the shapes of the model that was "
            "compressed (shapes=...)"
        )
