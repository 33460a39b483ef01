"""The protocols by which checkpoints of all formats are read."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from df11_jax._brief import listed
from df11_jax._files.safetensors import DTYPES


class TensorInfo(NamedTuple):
    """The description of one tensor in a checkpoint's header.

    Attributes:
        shape: the shape of the tensor, whatever it is stored as.
        dtype: the name of its dtype in safetensors files: `"BF16"`, `"F32"`.
        nbytes: the bytes of the tensor, not compressed.
        stored_nbytes: the bytes that it takes in the checkpoint.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    stored_nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype as numpy knows it; None if numpy does not."""
        return DTYPES.get(self.dtype)


class TensorSource(Protocol):
    """Tensors by name: a checkpoint, or anything else that has some."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order in which they are best read."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded, on the host; not to be written to.

        If numpy has no such dtype, it is the tensor's bytes.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the tensor is corrupt; the message names the file and the tensor.
        """


class Arrangement(NamedTuple):
    """The files in which tensors lie that are, or were before compression, in safetensors files.

    Attributes:
        shards: the names of tensors, by the names of files.
        metadata: the strings in the headers of the files, by their names.
        index_file: the name of the index; None if there is none.
        index_metadata: the entries of the index's metadata that are not computed.
    """

    shards: Mapping[str, Sequence[str]]
    metadata: Mapping[str, Mapping[str, str]]
    index_file: str | None
    index_metadata: Mapping[str, Any]


@runtime_checkable
class Source(TensorSource, Protocol):
    """A checkpoint that is read tensor by tensor, whatever its format.

    Opening it opens its files and reads headers; `read` takes the memory of one tensor, or in the
    published format that of the unit of which the tensor is a part.
    """

    @property
    def path(self) -> Path:
        """The directory or file."""

    @property
    def format(self) -> str:
        """`"plain"`, `"native"`, `"published"` or `"orbax"`."""

    def model_config(self) -> Mapping[str, Any]:
        """The content of the model's config.json; empty if there is none.

        Raises:
            ValueError: the file is damaged.
        """

    def arrangement(self) -> Arrangement | None:
        """The files of the tensors; None if they do not lie in safetensors files."""

    def fingerprint(self) -> dict[str, str]:
        """What tells the files that were opened from others, by their names."""

    def check_current(self) -> None:
        """Checks that the files at `path` are still those that were opened.

        Raises:
            ValueError: they are not; the message names some.
        """

    def check_unchanged(self) -> None:
        """Checks that nothing was written to the files since they were opened.

        Raises:
            ValueError: something was, so that what was read may be a mixture.
        """


def source_changed(path: Path, names: Sequence[str]) -> ValueError:
    """The error that says which files of a checkpoint are others by now."""
    return ValueError(
        f"{path}: changed while it was read: {listed(names)}. What was read may be a mixture; "
        "read it again when nothing writes to it"
    )


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of files that differ between two fingerprints, in order."""
    return sorted(name for name in {**old, **new} if old.get(name) != new.get(name))


@contextlib.contextmanager
def unchanged(source: TensorSource) -> Iterator[None]:
    """Raises an error if a checkpoint's files are written to while the block reads them.

    Otherwise what was read would be a mixture, or what comes of one, such as a verification that
    fails, would look like a bug or broken hardware.

    Args:
        source: the checkpoint. Other sources of tensors are not checked.

    Raises:
        ValueError: a file was changed; the message names it.
    """
    try:
        yield
    except (RuntimeError, ValueError):
        if isinstance(source, Source):
            source.check_unchanged()
        raise
    if isinstance(source, Source):
        source.check_unchanged()
