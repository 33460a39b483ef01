"""Checksums of the tensors in native files, which lie in `__metadata__` under `crc32:<name>`.

That of a tensor covers its name, dtype and shape, too, since a damaged header may have others that
fit. Coded exponents, signs and mantissas, which are nearly all of a file, have chunks with
checksums of their own, which are verified when they are decoded. Of all of them together the
exponents have a checksum, the *digest*; signs and mantissas have none.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from df11_jax._files import crc32
from df11_jax._files.safetensors import Tensor, TensorFile
from df11_jax._host_codec import payload_digest
from df11_jax._layout import Layout

_PREFIX = "crc32:"
DIGEST = "exponents"  # the part of a compressed leaf that has it
_COVERED = "sign_mantissa"


def metadata_key(name: str) -> str | None:
    """The key of a tensor's checksum in the metadata; None if it is to have none."""
    return None if name.partition(":")[2] == _COVERED else _PREFIX + name


def digest(payload: Sequence[np.ndarray], layout: Layout, where: str) -> str:
    """The checksum of a compressed leaf's exponents.

    Args:
        payload: the five arrays of the leaf.
        layout: its layout.
        where: the leaf, for messages.
    """
    return f"{payload_digest(payload, layout, where):08x}"


def checksum(tensor: Tensor) -> str:
    """The checksum of a tensor, as docs/format.md defines it."""
    dims = ",".join(map(str, tensor.shape))
    description = f"{tensor.name}\n{tensor.dtype}\n{dims}\n".encode()
    found = crc32.host_checksum([np.frombuffer(description, np.uint8), tensor.array])
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
    """Checks a tensor that was read against its checksum, if that is one of its bytes.

    Raises:
        ValueError: the tensor differs from the one that was written.
    """
    if name.partition(":")[2] == DIGEST:
        return
    expected, entry = checksums.get(name), file.entries[name]
    tensor = Tensor(name, entry.dtype, entry.shape, array)
    if expected is not None and (found := checksum(tensor)) != expected:
        raise ValueError(
            f"{file.path}: {name}: is corrupt: the CRC-32 of its {entry.dtype}{list(entry.shape)} "
            f"is {found}, expected {expected:.80}. Get another copy of the file, or write it again"
        )


def check_digest(
    payload: Sequence[np.ndarray], layout: Layout, expected: str | None, where: str
) -> None:
    """Checks that a compressed leaf is the one whose digest its file has, if there is one.

    Raises:
        ValueError: its chunks are others, or are corrupt.
    """
    if expected is not None and (found := digest(payload, layout, where)) != expected:
        raise ValueError(
            f"{where}: is corrupt: the digest of its chunks is {found}, expected {expected:.80}. "
            "Get another copy of the file, or write it again"
        )
