"""Files and directories that get their names only when they are complete.

Until then, each has a name of its own beside its path, and its writer holds a lock on it. What has
such a name and no lock was left by a writer that was killed. On a file system without locks nothing
is known to be left, so that nothing is removed.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
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

    Until then, its name ends in `.partial`, and differs from those of other writers of the path:
    of several, the last to succeed is the one whose file stays. A block that fails leaves nothing.
    What killed writers of the path have left is removed.

    Args:
        path: the path of the file.

    Yields:
        The file, open for writing.

    Raises:
        OSError: it cannot be written, or there can be no file of that path.
    """
    partial = None
    try:
        mode = _mode(path)
        remove_left(path.parent, path.name)
        partial, descriptor = _create(path, _create_file)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(descriptor, mode)
            # Otherwise a power failure could leave the name without the content.
            os.fsync(descriptor)
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


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that takes the place of another when the block has succeeded.

    Until then, and if the block fails or the process dies, the old one is as it was. What killed
    processes have left of new ones is removed.

    Args:
        path: the path of the directory to be replaced.

    Yields:
        The path at which to write the new one.

    Raises:
        OSError: it cannot be written, or the old one cannot be replaced.
    """
    path = path.resolve()
    mode = stat.S_IMODE(os.stat(path).st_mode)
    with directory_beside(path) as partial:
        yield partial
        partial.chmod(mode)
        _exchange(partial, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def directory_beside(path: Path) -> Iterator[Path]:
    """A directory of this writer alone, which is removed with all that is still in it.

    What killed writers of the path have left is removed, too.

    Args:
        path: the path for which something is written.

    Yields:
        The path of the directory, which is on the same file system.

    Raises:
        OSError: it cannot be made.
    """
    remove_left(path.parent, path.name)
    directory, descriptor = _create(path, _create_directory)
    try:
        yield directory
    finally:
        try:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            # Else nobody could remove what an interrupt has left, as long as this process runs.
            os.close(descriptor)


def remove_left(directory: Path, name: str | None = None) -> None:
    """Removes what writers that no longer exist have left.

    Args:
        directory: the path of the directory to look into.
        name: the name whose writers are meant; None for those of any name.
    """
    beginning = r".*" if name is None else re.escape(name[:_KEPT])
    pattern = re.compile(beginning + r"\.[0-9a-f]{8}" + re.escape(PARTIAL), re.DOTALL)
    for entry in directory.iterdir():
        if pattern.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                _remove_unless_locked(entry)


def lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Locks an open file or directory until it is closed.

    Args:
        descriptor: its descriptor.
        wait: whether to wait for a process that has locked it.

    Returns:
        False if another process has locked it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode(path: Path) -> int | None:
    """The permissions of the file that is to be replaced; None if there is none.

    Raises:
        OSError: there cannot be a file of that path, which is found now rather than in the end.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


def _create(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Creates what is to get a path later, and locks it.

    Returns:
        Its path until then, and its descriptor.
    """
    while True:
        partial = path.with_name(f"{path.name[:_KEPT]}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            descriptor = create(partial)
        except FileExistsError:
            continue
        # Between creation and lock, another writer may take it for one that was left.
        lock(descriptor, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(partial)):
                return partial, descriptor
        os.close(descriptor)


def _create_file(path: Path) -> int:
    # O_EXCL: neither another writer's file nor one behind a link that was planted.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def _create_directory(path: Path) -> int:
    path.mkdir()
    try:
        return _open_directory(path)
    except FileNotFoundError:  # removed already by somebody who took it for one that was left
        raise FileExistsError(path) from None


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_unless_locked(path: Path) -> None:
    is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = _open_directory(path) if is_directory else os.open(path, flags)
    try:
        if lock(descriptor):
            shutil.rmtree(path, ignore_errors=True) if is_directory else path.unlink()
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Lets two directories change places.

    At no time is there no directory at either path, if the system is Linux and the file system
    can do it. Otherwise there is none at `b` for a moment; if the process dies then, the one that
    was there has a name that ends in `.old`.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        paths = os.fsencode(a), os.fsencode(b)
        if library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise OSError(number, os.strerror(number), str(b))
    old = b.with_name(f"{b.name[:_KEPT]}.{secrets.token_hex(4)}.old")
    os.rename(b, old)
    os.rename(a, b)
    os.rename(old, a)
