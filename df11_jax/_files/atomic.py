"""Files that get their names only when they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name, and replaces what had it, when the block has succeeded.

    Until then, its name is `path` with `.partial` appended; a block that fails leaves nothing.

    Args:
        path: the path of the file.

    Yields:
        The file, open for writing.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            # Otherwise a power failure could leave the name without the content.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        # Errors of a full disk come from a descriptor, which has no name.
        if error.filename is None:
            error.filename = str(partial)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
