"""Safetensors files byte for byte as the library of that name writes them.

Files of published checkpoints can so be compared with others by their hashes. The types and shapes
of all tensors have to be known before the first is written; `safetensors.TensorWriter` writes files
for which they are not.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from df11_jax._files.atomic import new_file
from df11_jax._files.safetensors import check_name, numpy_form
from df11_jax._files.source import TensorInfo
from df11_jax._host_arrays import as_bytes

# Tensors of the last of these types come first in a file.
_ORDER = (
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
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
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, holding one tensor at a time, byte for byte as `safetensors` would.

    Args:
        path: the path of the file, which it gets when it is complete.
        tensors: the safetensors type, the shape and the number of bytes of each tensor, by name.
        read: a function that returns a tensor by its name; its bytes if numpy lacks the type.
        metadata: the strings for the header.

    Raises:
        ValueError: `read` returns a tensor of another type or shape, or a file cannot hold a tensor
            of that name.
    """
    places = {dtype: place for place, dtype in enumerate(_ORDER)}
    order = sorted(tensors, key=lambda name: (-places.get(tensors[name].dtype, -1), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name in order:
        check_name(name)
        info = tensors[name]
        start, stop = stop, stop + info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array, info = read(name), tensors[name]
            if (array.dtype, array.shape) != numpy_form(info.dtype, info.shape, info.nbytes):
                raise ValueError(
                    f"{name}: was announced as {info.dtype}{list(info.shape)}, but is "
                    f"{array.dtype}{list(array.shape)}"
                )
            file.write(as_bytes(array).data)
