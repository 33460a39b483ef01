"""Opens checkpoints of any format."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from df11_jax._files.directory import (
    ORBAX_METADATA,
    PUBLISHED_CONFIG,
    find_index,
    find_tensors,
    read_config,
    read_index,
)
from df11_jax._files.safetensors import TensorFile
from df11_jax._files.source import Source
from df11_jax.checkpoints._native_format import NativeCheckpoint, is_native
from df11_jax.checkpoints._plain import PlainCheckpoint

Shapes = Mapping[str, Sequence[int]] | str | os.PathLike[str]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    shapes: Shapes | None = None,
    pattern_dict: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """Opens a checkpoint, whose content determines its format.

    Plain and native checkpoints are one safetensors file, or a directory of a model as Hugging
    Face lays it out: `model.safetensors`, or shards with their index. An Orbax checkpoint is the
    folder of one item, which has the file `_METADATA`.

    Args:
        path: the path of the directory or file.
        shapes: the model's shapes, which only published checkpoints may need; see
            `df11_jax.published.Checkpoint`.
        pattern_dict: the tensors that units consist of, which only published checkpoints may need;
            see there.

    Returns:
        A reader, which has read headers only.

    Raises:
        FileNotFoundError: nothing is there, or a shard is missing.
        ValueError: the checkpoint has none of the formats, or is damaged; the message says what
            was found.
    """
    path = Path(path)
    if (path / ORBAX_METADATA).is_file():
        from df11_jax.checkpoints._orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    if _is_published(path):
        from df11_jax.published import Checkpoint

        return Checkpoint(path, shapes, pattern_dict)
    files = find_tensors(path)
    if is_native(files.values()):
        return NativeCheckpoint(path, files)
    return PlainCheckpoint(path, files)


def _is_published(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file() and _has_unit(TensorFile(path).entries)
    if PUBLISHED_CONFIG in read_config(path):
        return True
    index = find_index(path)
    listed = read_index(index) if index else {}
    if _has_unit(listed):
        return True
    # Published directories have a file for each unit, and an index, if any, of the other tensors.
    for file in set(path.glob("*.safetensors")) - {path / name for name in listed.values()}:
        try:
            if _has_unit(TensorFile(file).entries):
                return True
        except ValueError:
            if index is None:
                raise
            # Beside the files that an index lists, there may be anything.
    return False


def _has_unit(names: Iterable[str]) -> bool:
    return any(name.endswith(".encoded_exponent") for name in names)
