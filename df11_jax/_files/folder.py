"""The files of a model, each of which is opened once."""

import functools
import os
from pathlib import Path
from typing import Any, TypeVar

from df11_jax._brief import brief
from df11_jax._files.opened_file import OpenedFile
from df11_jax._files.other_formats import OtherFormatError, find_format
from df11_jax._files.safetensors import TensorFile
from df11_jax._files.untrusted_json import MAX_BYTES, parse_json

CONFIG = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"

_Kind = TypeVar("_Kind", bound=OpenedFile)


class SmallFile(OpenedFile):
    """A file that has been read.

    Attributes:
        content: the bytes of the file.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is larger than is sensible, or was changed while it was read.
        """
        super().__init__(path)
        if self.nbytes > MAX_BYTES:
            raise ValueError(f"{path}: has {self.nbytes:,} bytes, expected up to {MAX_BYTES:,}")
        self.content = self.read(self.nbytes)
        self.check_unchanged()


class JsonFile(SmallFile):
    """A JSON file that has been read.

    Attributes:
        fields: the object in it.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the content of the file is not a JSON object.
        """
        super().__init__(path)
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

    Each file is opened at the first use, once, so that everybody who asks what is in the directory
    sees the same files, even if others take their places meanwhile.

    Attributes:
        path: the path that was given.
        is_file: whether that is the path of a single file, and no index.
        index: the name of the index whose path was given; None if it was another path.
        directory: the path of the directory.
        names: the names of what is in the directory; of the single file alone, if it is one.
    """

    def __init__(self, path: Path) -> None:
        """Lists the directory.

        Raises:
            FileNotFoundError: nothing is there.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: does not exist")
        self.path = path
        is_directory = path.is_dir()
        is_index = not is_directory and path.name.endswith(INDEX_SUFFIX)
        self.index = path.name if is_index else None
        self.is_file = not is_directory and not is_index
        self.directory = path if is_directory else path.parent
        self.names = [path.name] if self.is_file else sorted(os.listdir(self.directory))
        self._opened: dict[str, OpenedFile] = {}

    @property
    def tensor_files(self) -> list[str]:
        """The names of all safetensors files, or the name of the single file."""
        return [name for name in self.names if self.is_file or name.endswith(".safetensors")]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty if there is none."""
        there = (self.directory / CONFIG).exists() if self.is_file else CONFIG in self.names
        return self.json(CONFIG) if there else {}

    def tensors(self, name: str) -> TensorFile:
        """A safetensors file.

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
        return self._open(name, JsonFile).fields

    def content(self, name: str) -> bytes:
        """The content of a small file of any kind.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no file, or larger than is sensible.
        """
        return self._open(name, SmallFile).content

    @property
    def opened(self) -> list[Path]:
        """The paths of the files that were opened."""
        return [file.path for file in self._opened.values()]

    def check_current(self) -> None:
        """Checks that all files that were opened were in the directory at one time.

        Raises:
            ValueError: one was replaced before another was opened.
        """
        # The last one was there when it was opened, and so were those that are there still.
        for file in list(self._opened.values())[:-1]:
            if not file.is_at_its_path():
                raise ValueError(
                    f"{file.path}: was replaced while the other files were opened. Try again when "
                    "nothing writes to the directory"
                )

    def check_unchanged(self) -> None:
        """Checks that nothing was written to the open files.

        Raises:
            ValueError: something was.
        """
        for file in self._opened.values():
            file.check_unchanged()

    def _open(self, name: str, kind: type[_Kind]) -> _Kind:
        if name not in self._opened:
            self._opened[name] = kind(self.directory / name)
        file = self._opened[name]
        assert isinstance(file, kind), "a file is of one kind"
        return file
