"""The signs by which directories of weights are recognised."""

from df11_jax._files.folder import Folder


def is_orbax(folder: Folder) -> bool:
    """Whether a directory is the folder of an item that Orbax has saved."""
    return not folder.is_file and "_METADATA" in folder.names


def has_weights(folder: Folder) -> bool:
    """Whether there are weights in a directory, in any format."""
    return is_orbax(folder) or bool(folder.tensor_files)
