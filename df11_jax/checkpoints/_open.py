"""Opens checkpoints of any format."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from df11_jax._files.directory import find_tensors
from df11_jax._files.folder import Folder
from df11_jax._files.source import Source
from df11_jax.checkpoints._native_format import NativeCheckpoint, is_native
from df11_jax.checkpoints._plain import PlainCheckpoint
from df11_jax.checkpoints.detect import check_meant, is_orbax
from df11_jax.published import Checkpoint
from df11_jax.published.detect import is_published

_TRIES = 20

Shapes = Mapping[str, Sequence[int]] | str | os.PathLike[str]


def open_checkpoint(
    path: str | os.PathLike[str] | Folder,
    *,
    shapes: Shapes | None = None,
    pattern_dict: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """Opens a checkpoint, whose content determines its format.

    Plain and native checkpoints are one safetensors file, or a directory of a model as Hugging
    Face lays it out: `model.safetensors`, or shards with their index. An Orbax checkpoint is the
    folder of one item, which has the file `_METADATA`.

    Args:
        path: the path of the directory or file; or of an index, if a directory has several.
        shapes: the model's shapes, which only published checkpoints may need; see
            `df11_jax.published.Checkpoint`.
        pattern_dict: the tensors that units consist of, which only published checkpoints may need;
            see there.

    Returns:
        A reader, which has read headers only.

    Raises:
        FileNotFoundError: nothing is there, or a shard is missing.
        OSError: a file cannot be read.
        ValueError: the checkpoint has none of the formats, or is damaged, or a file was replaced
            while the others were opened; the message says what was found.
    """
    if isinstance(path, Folder):
        return _open(path, shapes, pattern_dict)
    for left in reversed(range(_TRIES)):
        folder = Folder(Path(path))
        try:
            return _open(folder, shapes, pattern_dict)
        except (OSError, ValueError):
            # The files of a directory that has been replaced as a whole are being deleted.
            if not left or not folder.is_replaced():
                raise
    raise AssertionError("unreachable")


def _open(
    folder: Folder,
    shapes: Shapes | None,
    pattern_dict: Mapping[str, Sequence[str]] | None,
) -> Source:
    if is_orbax(folder):
        from df11_jax.checkpoints._orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(folder.path)
    if is_published(folder):
        return Checkpoint(folder, shapes, pattern_dict)
    check_meant(folder)
    files = find_tensors(folder)
    kind = NativeCheckpoint if is_native(files.values()) else PlainCheckpoint
    source = kind(folder, files)
    folder.check_together()
    return source
