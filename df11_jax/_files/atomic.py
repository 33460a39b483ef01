"""Files that get their names only when they are complete."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"

# A name may have 255 bytes, and a character may take four.
_KEPT = 50

# Of the system call renameat2, which Python does not offer.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name, and replaces what had it, when the block has succeeded.

    Until then, it has a name of its own that ends in `.partial`, so that several writers of one
    path do not meet: the last to succeed is the one whose file stays. A block that fails leaves
    nothing. What killed writers of the path have left is removed.

    Args:
        path: the path of the file.

    Yields:
        The file, open for writing.
    """
    partial = None
    try:
        _check_name(path)
        remove_partial_files(path)
        partial, descriptor = _create_partial(path)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            # Otherwise a power failure could leave the name without the content.
            os.fsync(file.fileno())
            # While the lock is held, nobody takes this for what a killed writer has left.
            os.replace(partial, path)
    except OSError as error:
        # Errors of a full disk come from a descriptor, which has no name.
        if error.filename is None:
            error.filename = str(partial or path)
        raise
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def partial_path(path: Path) -> Path:
    """A path beside `path` that nobody has, for what is to get that path when it is complete."""
    return path.with_name(f"{path.name[:_KEPT]}.{secrets.token_hex(4)}{PARTIAL}")


def partial_paths(path: Path) -> Iterator[Path]:
    """The paths of that kind that exist."""
    name = re.compile(re.escape(path.name[:_KEPT]) + r"\.[0-9a-f]{8}" + re.escape(PARTIAL))
    return (entry for entry in path.parent.iterdir() if name.fullmatch(entry.name))


def remove_partial_files(path: Path) -> None:
    """Removes the incomplete files of writers of `path` that no longer exist.

    A writer holds a lock on its file as long as it lives.
    """
    for entry in partial_paths(path):
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
            finally:
                os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_name(path: Path) -> None:
    """Raises OSError now rather than when all is written if a file cannot have this path."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _create_partial(path: Path) -> tuple[Path, int]:
    """Creates an incomplete file, and locks it."""
    while True:
        partial = partial_path(path)
        # O_EXCL: neither another writer's file nor one behind a link that was planted.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(partial, flags, 0o666)
        except FileExistsError:
            continue
        # Between creation and lock, another writer may take it for one that was left.
        with contextlib.suppress(OSError):  # a file system without locks, which then removes none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return partial, descriptor
        os.close(descriptor)


def exchange(a: Path, b: Path) -> None:
    """Lets two directories change places.

    At no time is there no directory at either path, if the system is Linux and the file system
    can do it. Otherwise there is none at `b` for a moment.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        paths = os.fsencode(a), os.fsencode(b)
        if library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(a), None, str(b))
    third = partial_path(b)
    os.rename(b, third)
    os.rename(a, b)
    os.rename(third, a)
