"""The signs of a published checkpoint: an entry of its config.json, or the names of tensors."""

from collections.abc import Iterable
from pathlib import Path

from df11_jax._files.directory import find_index, read_config, read_index
from df11_jax._files.safetensors import TensorFile

CONFIG_KEY = "dfloat11_config"  # of the entry that a config.json has for the units


def is_published(path: Path) -> bool:
    """Whether a file or directory is a published checkpoint, even a damaged one."""
    if not path.is_dir():
        return path.is_file() and _has_unit(TensorFile(path).entries)
    if CONFIG_KEY in read_config(path):
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
