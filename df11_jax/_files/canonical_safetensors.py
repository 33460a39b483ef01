"""Safetensors files byte for byte as the library of that name writes them.

Files of published checkpoints can so be compared with others by their hashes. The types and shapes
of all tensors have to be known before the first is written; `safetensors.TensorWriter` writes files
for which they are not.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from df11_jax._files.atomic import new_file
from df11_jax._files.safetensors import DTYPES
from df11_jax._host_arrays import as_bytes

# Tensors of the last of these types come first in a file.
_ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
)


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, holding one tensor at a time, byte for byte as `safetensors` would.

    Args:
        path: the path of the file, which it gets when it is complete.
        tensors: the safetensors type and the shape of each tensor, by name.
        read: a function that returns a tensor by its name.
        metadata: the strings for the header.

    Raises:
        ValueError: `read` returns a tensor of another type or shape.
    """
    order = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name][0]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name in order:
        dtype, shape = tensors[name]
        start, stop = stop, stop + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array, (dtype, shape) = read(name), tensors[name]
            if array.dtype != DTYPES[dtype] or array.shape != shape:
                raise ValueError(
                    f"{name}: was announced as {dtype}{list(shape)}, but is "
                    f"{array.dtype}{list(array.shape)}"
                )
            file.write(as_bytes(array).data)
