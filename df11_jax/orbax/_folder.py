"""The files of a checkpoint that may be damaged or hostile, before Orbax reads them."""

import os
import stat
from pathlib import Path

from etils import epath

from df11_jax._files.file_stats import walk
from df11_jax._files.untrusted_json import MAX_BYTES

# Orbax's metadata of a pytree.
METADATA_FILE = "_METADATA"

# The files that Orbax and TensorStore read whole, into memory, beside those of JSON.
_READ_WHOLE = {METADATA_FILE, "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt", ".zarray"}
_READ_WHOLE_BELOW = "array_metadatas/"


def check_path(directory: os.PathLike[str] | str) -> None:
    """Raises ValueError if Orbax cannot read or write a directory of that path."""
    try:
        os.fspath(directory).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{directory}: is not UTF-8, as the paths of Orbax's checkpoints must be; rename it"
        ) from None


def check_files(directory: epath.Path) -> int | None:
    """Checks that Orbax can read all files of an item without blocking, and in bounded memory.

    Args:
        directory: the directory of the item.

    Returns:
        The bytes of all its files; None if the directory is not on a local file system.

    Raises:
        OSError: the directory cannot be read.
        ValueError: there is a pipe, a device or a link to a directory, or metadata is too long.
    """
    if "://" in os.fspath(directory):
        return None
    total = 0
    for name, status in walk(Path(directory)):
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(
                f"{directory}: {name}: is a pipe, a device or a link to a directory, expected a "
                "file. No checkpoint has that: delete it"
            )
        total += status.st_size
        is_read_whole = name.startswith(_READ_WHOLE_BELOW) or name.endswith(".json")
        is_read_whole |= name.rpartition("/")[2] in _READ_WHOLE
        if is_read_whole and status.st_size > MAX_BYTES:
            raise ValueError(
                f"{directory}: {name}: has {status.st_size} bytes, expected at most {MAX_BYTES} of "
                "metadata: it is damaged. Restore another copy of it"
            )
    return total
