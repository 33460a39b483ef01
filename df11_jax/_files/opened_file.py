"""Files that are opened once, and can tell whether they are still what was opened."""

import contextlib
import mmap
import os
import stat
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class FileState(NamedTuple):
    """What changes if a file is replaced, or written to."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileState":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class OpenedFile:
    """A regular file, open for reading as long as this object exists.

    Whatever happens to its path, what is read is the file that was there when it was opened.

    Attributes:
        path: the path by which it was opened.
        nbytes: its size.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the path is that of a directory, or of a pipe or a device, which might never
                end.
        """
        self.path = path
        # Opening a pipe would otherwise wait for somebody to write to it.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is a directory, pipe or device, expected a file")
        self._state = FileState.of(status)
        self.nbytes = self._state.nbytes

    def read(self, nbytes: int, offset: int = 0) -> bytes:
        """Bytes of the file.

        Raises:
            OSError: they cannot be read.
            ValueError: the file has become shorter.
        """
        parts = []
        while nbytes:
            with self._named_errors():
                part = os.pread(self._descriptor, nbytes, offset)
            if not part:
                raise ValueError(f"{self.path}: has become shorter while it was read")
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    def map(self) -> mmap.mmap:
        """All of the file, which must not be empty, mapped into memory for reading."""
        # Without a descriptor of its own, of which there may be no more than 1,024.
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        with self._named_errors():
            return mmap.mmap(self._descriptor, self.nbytes, access=mmap.ACCESS_READ, **options)

    def check_unchanged(self) -> None:
        """Checks that nothing was written to the file since it was opened.

        Raises:
            ValueError: its size or its time of modification has changed.
        """
        if FileState.of(os.fstat(self._descriptor)) != self._state:
            raise ValueError(
                f"{self.path}: was changed while it was read, so that what was read may be a "
                "mixture. Read it again when nothing writes to it"
            )

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Names the file in errors of the system, which know its descriptor alone."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to the file, as it was when it was opened."""
        try:
            return FileState.of(os.stat(self.path)) == self._state
        except OSError:
            return False
