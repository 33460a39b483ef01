"""What the file system says of the files below a folder."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from df11_jax._files.opened_file import FileState


def walk(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Finds all that lies below a folder and is no directory itself.

    Links to directories are not followed: they come as what they are linked to. Links that lead
    nowhere, and what is deleted meanwhile, do not come.

    Args:
        path: the folder.

    Yields:
        The path relative to the folder, with `/`, and the status of the file.

    Raises:
        OSError: a directory cannot be read.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                    continue
                try:
                    status = entry.stat()
                except OSError:
                    continue
                yield name, status


def file_stats(path: Path) -> dict[str, str]:
    """The size and the time of modification of each file, which differ once a file is changed.

    Args:
        path: a folder.

    Returns:
        A text for each regular file below the folder, by its path relative to the folder, with `/`,
        in sorted order. Links to directories are not followed.

    Raises:
        OSError: a directory cannot be read.
    """
    return {
        name: str(FileState.of(status))
        for name, status in sorted(walk(path))
        if stat.S_ISREG(status.st_mode)
    }
