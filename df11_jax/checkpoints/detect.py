"""The signs by which directories of weights are recognised, and what is said of others."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from df11_jax._brief import brief, listed
from df11_jax._files.directory import check_complete, find_indices
from df11_jax._files.folder import CONFIG, Folder
from df11_jax._files.opened_file import OpenedFile
from df11_jax._files.other_formats import START_BYTES, OtherFormatError, find_format

_ORBAX = "_METADATA"
ADAPTER_CONFIG = "adapter_config.json"
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".npz", ".pkl", ".pt", ".pth")
_MOST_FOLDERS = 50  # that are looked into, of those in a folder
# Tensors that models have beside weights, or in their places, if they are quantized.
_QUANTIZED = {
    "g_idx": "gptq",
    "qweight": "awq",  # or gptq in another form
    "weight_scale_inv": "fp8",
    "weight_scale": "fp8",
    "weight_packed": "compressed-tensors",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
}


def is_orbax(folder: Folder) -> bool:
    """Whether a directory is the folder of an item that Orbax has saved."""
    return not folder.is_file and folder.index is None and _ORBAX in folder.names


def is_adapter(folder: Folder) -> bool:
    """Whether a directory is an adapter of PEFT, which lacks the model that it adapts."""
    directory = folder.directory
    return (directory / ADAPTER_CONFIG).exists() and not (directory / CONFIG).exists()


def find_quantization(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The method by which a model was quantized, which leaves no bfloat16 weights to compress.

    Args:
        names: the names of its tensors.
        config: the content of its config.json; empty if there is none.

    Returns:
        The name of the method; None if the model is not known to be quantized.
    """
    said = config.get("quantization_config")
    if isinstance(said, Mapping) and "quant_method" in said:
        return brief(said["quant_method"])
    parts = {name.rpartition(".")[2] for name in names}
    return next((method for part, method in _QUANTIZED.items() if part in parts), None)


def has_weights(folder: Folder) -> bool:
    """Whether there are weights in a directory, in any format."""
    return is_orbax(folder) or bool(folder.tensor_files)


def check_meant(folder: Folder) -> None:
    """Checks that a directory without weights is not given in place of another, or of a file.

    Raises:
        ValueError: folders in it have weights, or it has weights of a format that is not read.
    """
    if has_weights(folder) or find_indices(folder):
        return
    check_complete(folder)
    if below := [str(path) for path in _folders_with_weights(folder.path)]:
        raise ValueError(
            f"{folder.path}: holds no weights itself, but folders in it do; give the path of one "
            f"of these: {listed(below)}"
        )
    for name in folder.names:
        if name.endswith(_OTHER_WEIGHTS) and (folder.directory / name).is_file():
            file = OpenedFile(folder.directory / name)
            if kind := find_format(file.read(min(START_BYTES, file.nbytes))):
                raise OtherFormatError(f"{file.path}: is {kind}; expected safetensors files")


def _folders_with_weights(path: Path) -> Iterator[Path]:
    """The nearest folders with weights: parts of a pipeline, steps and items of Orbax."""
    folders = _folders(path)
    found = [folder for folder in folders if _looks_like_weights(folder)]
    if found:
        yield from found
        return
    for folder in folders:
        yield from (inner for inner in _folders(folder) if _looks_like_weights(inner))


def _folders(path: Path) -> list[Path]:
    """The folders in a directory, the last of numbered ones first."""

    def order(folder: Path) -> tuple[str, int, str]:
        number = re.search(r"[0-9]{1,18}$", folder.name)
        stem = folder.name[: number.start()] if number else folder.name
        return stem, -int(number[0]) if number else 0, folder.name

    with contextlib.suppress(OSError):
        entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        return sorted(filter(Path.is_dir, entries), key=order)[:_MOST_FOLDERS]
    return []


def _looks_like_weights(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(name == _ORBAX or name.endswith(".safetensors") for name in os.listdir(path))
    return False
