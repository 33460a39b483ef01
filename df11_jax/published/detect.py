"""The signs of a published checkpoint: an entry of its config.json, or the names of tensors."""

from collections.abc import Iterable

from df11_jax._files.directory import find_index, read_index
from df11_jax._files.folder import Folder

CONFIG_KEY = "dfloat11_config"  # of the entry that a config.json has for the units


def is_published(folder: Folder) -> bool:
    """Whether a file or directory is a published checkpoint, even a damaged one."""
    if folder.is_file:
        return _has_unit(folder.other_tensors(folder.path.name).entries)
    if CONFIG_KEY in folder.config:
        return True
    index = find_index(folder)
    listed = read_index(folder, index) if index else {}
    if _has_unit(listed):
        return True
    if folder.index is not None:
        return False
    # Published directories have a file for each unit, and an index, if any, of the other tensors.
    for name in sorted(set(folder.tensor_files) - set(listed.values())):
        try:
            if _has_unit(folder.other_tensors(name).entries):
                return True
        except ValueError:
            if index is None:
                raise
            # Beside the files that an index lists, there may be anything.
    return False


def _has_unit(names: Iterable[str]) -> bool:
    return any(name.endswith(".encoded_exponent") for name in names)
