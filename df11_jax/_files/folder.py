"""The files of a model, each of which is opened once."""

import functools
import os
import re
import stat
import weakref
from pathlib import Path
from typing import Any, TypeVar

from df11_jax._brief import brief
from df11_jax._files.opened_file import FileState, OpenedFile
from df11_jax._files.other_formats import OtherFormatError, find_format
from df11_jax._files.safetensors import TensorFile
from df11_jax._files.untrusted_json import MAX_BYTES, parse_json

CONFIG = "config.json"
# Of a variant: `model.fp16.safetensors.index.json` or `model.safetensors.index.fp16.json`.
_INDEX = re.compile(r".*\.safetensors\.index(\.[\w-]+)?\.json", re.DOTALL)

_Kind = TypeVar("_Kind", bound=OpenedFile)


def is_index(name: str) -> bool:
    """Whether the name of a file is that of an index of shards."""
    return _INDEX.fullmatch(name) is not None


class SmallFile(OpenedFile):
    """A file that has been read.

    Attributes:
        content: the bytes of the file.
    """

    def __init__(self, path: Path, directory: int | None = None) -> None:
        """Reads the file.

        Args:
            path: the path of the file.
            directory: the descriptor of its directory; see `OpenedFile`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is larger than is sensible, or was changed while it was read.
        """
        super().__init__(path, directory)
        if self.nbytes > MAX_BYTES:
            raise ValueError(f"{path}: has {self.nbytes:,} bytes, expected up to {MAX_BYTES:,}")
        self.content = self.read(self.nbytes)
        self.check_unchanged()


class JsonFile(SmallFile):
    """A JSON file that has been read.

    Attributes:
        fields: the object in it.
    """

    def __init__(self, path: Path, directory: int | None = None) -> None:
        """Reads the file.

        Args:
            path: the path of the file.
            directory: the descriptor of its directory; see `OpenedFile`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the content of the file is not a JSON object.
        """
        super().__init__(path, directory)
        try:
            fields = parse_json(self.content)
        except ValueError as error:
            if kind := find_format(self.content):
                raise OtherFormatError(f"{path}: is {kind}; expected JSON") from None
            raise ValueError(f"{path}: is not a JSON file ({error!s:.200})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: expected a JSON object, got {brief(fields)}")
        self.fields: dict[str, Any] = fields


class Folder:
    """The directory of a model, or a single file and the configuration beside it.

    The path of an index is that of the directory, of which the index names the shards.

    The directory and each of its files are opened once, so that everybody who asks what is in it
    sees the same files, even if others take their places meanwhile.

    Attributes:
        path: the path that was given.
        is_file: whether that is the path of a single file, and no index.
        index: the name of the index whose path was given; None if it was another path.
        directory: the path of the directory, for messages.
        states: the states of what is in the directory, by name; of the single file alone, if it
            is one. None for what is no file.
    """

    def __init__(self, path: Path) -> None:
        """Lists the directory.

        Raises:
            FileNotFoundError: nothing is there.
            OSError: the directory cannot be read.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: does not exist")
        self.path = path
        is_directory = path.is_dir()
        self.index = path.name if not is_directory and is_index(path.name) else None
        self.is_file = not is_directory and self.index is None
        self.directory = path if is_directory else path.parent
        self._opened: dict[str, OpenedFile] = {}
        self._used: set[str] = set()
        # The working directory may change.
        self._absolute = self.directory.absolute()
        self._descriptor = None
        names = [path.name]
        if not self.is_file:
            self._descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            names = sorted(os.listdir(self._descriptor))
        self.states = {name: self._state(name) for name in names}

    @property
    def names(self) -> list[str]:
        """The names of what is in the directory, in order; or that of the single file."""
        return list(self.states)

    @property
    def tensor_files(self) -> list[str]:
        """The names of all safetensors files, or the name of the single file."""
        return [name for name in self.states if self.is_file or name.endswith(".safetensors")]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty if there is none.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        there = (self.directory / CONFIG).exists() if self.is_file else CONFIG in self.states
        return self.json(CONFIG) if there else {}

    def tensors(self, name: str) -> TensorFile:
        """A safetensors file that is a part of the model.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        self._used.add(name)
        return self.other_tensors(name)

    def other_tensors(self, name: str) -> TensorFile:
        """A safetensors file that need not be a part of the model, so that it may change.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        return self._open(name, TensorFile)

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        self._used.add(name)
        return self._open(name, JsonFile).fields

    def content(self, name: str) -> bytes:
        """The content of a small file of any kind.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no file, or larger than is sensible.
        """
        self._used.add(name)
        return self._open(name, SmallFile).content

    def state(self, name: str) -> FileState | None:
        """The state of a file: as it was when it was opened, or else when the directory was.

        Returns:
            The state; None if it is no file.
        """
        return self._opened[name].state if name in self._used else self.states.get(name)

    @property
    def used(self) -> list[str]:
        """The names of the files that were opened as parts of the model."""
        return [name for name in self._opened if name in self._used]

    def is_replaced(self) -> bool:
        """Whether the path leads to another directory than the one that was opened."""
        if self._descriptor is None:
            return False
        try:
            return not os.path.samestat(os.stat(self._absolute), os.fstat(self._descriptor))
        except OSError:
            return True

    def changed(self, names: list[str]) -> list[str]:
        """Those of some files at whose paths there is something else by now."""
        current = {name: _state_at(self._absolute / name) for name in names}
        return [name for name in names if current[name] != self.state(name)]

    def check_together(self) -> None:
        """Checks that all files that were opened were in the directory at one time.

        Raises:
            ValueError: one was replaced before another was opened.
        """
        # The last one was there when it was opened, and so were those that are there still.
        for name in self.used[:-1]:
            if self._state(name) != self._opened[name].state:
                raise ValueError(
                    f"{self.directory / name}: was replaced while the other files were opened. Try "
                    "again when nothing writes to the directory"
                )

    def check_unchanged(self) -> None:
        """Checks that nothing was written to the open files.

        Raises:
            ValueError: something was.
        """
        for name in self.used:
            self._opened[name].check_unchanged()

    def _state(self, name: str) -> FileState | None:
        path = self._absolute / name if self._descriptor is None else name
        return _state_at(path, self._descriptor)

    def _open(self, name: str, kind: type[_Kind]) -> _Kind:
        file = self._opened.get(name)
        if file is None:
            path = self.path if self.is_file and name == self.path.name else self.directory / name
            file = self._opened[name] = kind(path, self._descriptor)
        if not isinstance(file, kind):
            raise ValueError(f"{file.path}: is taken for two different things")
        return file


def _state_at(path: str | Path, directory: int | None = None) -> FileState | None:
    try:
        status = os.stat(path, dir_fd=directory)
    except OSError:
        return None
    return FileState.of(status) if stat.S_ISREG(status.st_mode) else None
