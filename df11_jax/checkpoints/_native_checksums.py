"""Checksums of the tensors in native files, which lie in `__metadata__` under `crc32:<name>`.

Coded exponents, signs and mantissas, which are nearly all of a file, have none: their chunks have
checksums of their own, which are verified when they are decoded. Every other tensor has one. It
covers the tensor's name, dtype and shape, too, since a damaged header may have others that fit.
"""

from collections.abc import Mapping

import numpy as np

from df11_jax._files import crc32
from df11_jax._files.safetensors import DTYPE_NAMES, TensorFile

_PREFIX = "crc32:"
_CHECKED_BY_CHUNK = ("exponents", "sign_mantissa")


def metadata_key(name: str) -> str | None:
    """The key of a tensor's checksum in the metadata; None if it is to have none."""
    return None if name.partition(":")[2] in _CHECKED_BY_CHUNK else _PREFIX + name


def checksum(name: str, array: np.ndarray) -> str:
    """The checksum of a tensor, as docs/format.md defines it."""
    dims = ",".join(map(str, array.shape))
    description = f"{name}\n{DTYPE_NAMES[array.dtype]}\n{dims}\n".encode()
    found = crc32.host_checksum([np.frombuffer(description, np.uint8), array])
    return f"{found:08x}"


def has_checksums(file: TensorFile) -> bool:
    """Whether a file has any checksums."""
    return any(key.startswith(_PREFIX) for key in file.metadata)


def split_metadata(file: TensorFile) -> tuple[dict[str, str], dict[str, str]]:
    """A file's metadata without checksums, and its checksums by the names of tensors.

    Raises:
        ValueError: the tensors with a checksum are not those that are to have one.
    """
    other = {key: value for key, value in file.metadata.items() if not key.startswith(_PREFIX)}
    checksums = {
        key.removeprefix(_PREFIX): file.metadata[key] for key in file.metadata.keys() - other
    }
    covered = {name for name in file.entries if metadata_key(name)}
    # Files that were written before checksums were introduced have none at all.
    if checksums and checksums.keys() != covered:
        name = min(checksums.keys() ^ covered)
        found = "a checksum, but no tensor" if name in checksums else "a tensor, but no checksum"
        raise ValueError(
            f"{file.path}: {name}: is corrupt: the header has {found} of that name, expected both"
        )
    return other, checksums


def check(file: TensorFile, name: str, array: np.ndarray, checksums: Mapping[str, str]) -> None:
    """Checks a tensor that was read against its checksum, if there is one.

    Raises:
        ValueError: the tensor differs from the one that was written.
    """
    expected = checksums.get(name)
    if expected is not None and (found := checksum(name, array)) != expected:
        raise ValueError(
            f"{file.path}: {name}: is corrupt: the CRC-32 of its {array.dtype}{list(array.shape)} "
            f"is {found}, expected {expected:.80}. Get another copy of the file, or write it again"
        )
