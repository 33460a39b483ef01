"""The signs by which directories of weights are recognised."""

from pathlib import Path


def is_orbax(path: Path) -> bool:
    """Whether a directory is the folder of an item that Orbax has saved."""
    return (path / "_METADATA").is_file()


def has_weights(path: Path) -> bool:
    """Whether there are weights in a directory, in any format."""
    return is_orbax(path) or any(path.glob("*.safetensors"))
