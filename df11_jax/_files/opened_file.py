"""Files that are opened once, and can tell whether they are still what was opened."""

import contextlib
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """What changes if a file is replaced, or written to."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileState":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        """The part that a copy of the file has, too."""
        return f"{self.nbytes} bytes, {self.mtime_ns} ns"


class OpenedFile:
    """A regular file, open for reading as long as this object exists.

    Whatever happens to its path, what is read is the file that was there when it was opened.

    Attributes:
        path: the path by which it was opened, for messages.
        nbytes: its size.
        state: its state when it was opened.
    """

    def __init__(self, path: Path, directory: int | None = None) -> None:
        """Opens the file.

        Args:
            path: the path of the file.
            directory: the descriptor of its directory, in which the name is looked up; None for
                the directory that is at the path.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the path is that of a directory, or of a pipe or a device, which might never
                end.
        """
        self.path = path
        # Opening a pipe would otherwise wait for somebody to write to it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            name = path if directory is None else path.name
            self._descriptor = os.open(name, flags, dir_fd=directory)
        except OSError as error:
            error.filename = str(path)
            raise
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is a directory, pipe or device, expected a file")
        self.state = FileState.of(status)
        self.nbytes = self.state.nbytes
        # A mapping has a descriptor, and what was read of it counts as memory of this process: so
        # it is there only while an array needs it.
        self._mapped: weakref.ref[mmap.mmap] | None = None

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
        """All of the file, which must not be empty, mapped into memory for reading.

        Raises:
            OSError: the system has no more descriptors, or no more memory.
        """
        mapped = self._mapped() if self._mapped is not None else None
        if mapped is None:
            with self._named_errors():
                mapped = mmap.mmap(self._descriptor, self.nbytes, access=mmap.ACCESS_READ)
            self._mapped = weakref.ref(mapped)
        return mapped

    def check_unchanged(self) -> None:
        """Checks that nothing was written to the file since it was opened.

        Raises:
            ValueError: its size or its time of modification has changed.
        """
        if FileState.of(os.fstat(self._descriptor)) != self.state:
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
