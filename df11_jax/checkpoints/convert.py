"""Writes a checkpoint in another format, with little of it in memory at a time."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from df11_jax._files.directory import copy_small_files, write_index
from df11_jax._files.journal import fingerprint, incomplete
from df11_jax._files.safetensors import DTYPES
from df11_jax._files.source import Source, TensorInfo
from df11_jax._host_arrays import cpu_device
from df11_jax._host_codec import encode
from df11_jax._layout import make_layout
from df11_jax._progress import ProgressBar
from df11_jax._select import is_candidate, is_worth_keeping
from df11_jax.checkpoints._native_format import METADATA, part_names
from df11_jax.checkpoints._pytree import load
from df11_jax.checkpoints._shard_files import Places, Tensors, plan_shards, write_shard
from df11_jax.published.detect import CONFIG_KEY


def write_native(
    source: Source,
    path: Path,
    *,
    verify: bool = True,
    progress: bool = False,
) -> None:
    """Writes a native checkpoint, with one tensor in memory at a time.

    It compresses the tensors that `compress_params` would. The directory is complete when it has
    an index; after an interruption, the same call writes the shards that are missing.

    Args:
        source: the checkpoint to compress.
        path: the path of the directory, which is new, empty, or left behind by an interruption.
        verify: whether to decode each tensor and compare it bit by bit before it is written.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: there is something else at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, has a dtype that cannot be read, or has names that the
            format cannot hold.
        RuntimeError: verification failed.
    """
    _write(source, path, _NativeTarget(source, verify), progress)


def write_plain(source: Source, path: Path, *, progress: bool = False) -> None:
    """Writes a checkpoint without compression, as Hugging Face's libraries read it.

    Memory, and what happens after an interruption, are as for `write_native`.

    Args:
        source: the checkpoint to decompress.
        path: the path of the directory, which is new, empty, or left behind by an interruption.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: there is something else at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, or has a dtype that cannot be read.
    """
    _write(source, path, _PlainTarget(source), progress)


def write_orbax(source: Source, path: Path, *, progress: bool = False) -> None:
    """Writes a checkpoint that `df11_jax.orbax.DF11Restore` restores.

    All tensors are in memory at once, compressed. Orbax gives the folder its name when it is
    complete; after an interruption, everything has to be done again.

    Args:
        source: the checkpoint to compress.
        path: the path of the new folder.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: there is something at `path`.
        ImportError: Orbax is not installed.
        OSError: reading or writing failed.
        ValueError: the source is corrupt.
    """
    from df11_jax.orbax.items import save_item  # Orbax is optional

    if path.exists():
        raise FileExistsError(f"{path}: exists already; expected a new directory")
    with jax.default_device(cpu_device()):
        params = load(source, progress=progress)
    save_item(params, path.resolve())


class _PlainTarget:
    """A checkpoint to be written whose leaves are stored plain."""

    def __init__(self, source: Source) -> None:
        for name, info in source.tensors.items():
            if info.dtype not in DTYPES:
                raise ValueError(f"{source.path}: {name}: cannot read the dtype {info.dtype}")
        self._source = source
        self.format = "plain"
        self.verb = "decompress"
        # transformers refuses files that do not name the library that they are for.
        self.metadata = {"format": "pt"}
        self.has_checksums = False

    def places(self, name: str) -> Places:
        """The names and numbers of dimensions of all tensors that a leaf may be stored as."""
        return [(name, len(self._source.tensors[name].shape))]

    def tensors(self, name: str) -> Tensors:
        """The tensors that a leaf is stored as."""
        return [(name, self._source.read(name))]

    def itemsize(self, info: TensorInfo) -> int:
        """The bytes of an element of the tensors that a leaf may be stored as."""
        return DTYPES[info.dtype].itemsize


class _NativeTarget(_PlainTarget):
    """A checkpoint to be written whose leaves are compressed if that makes them smaller."""

    def __init__(self, source: Source, verify: bool) -> None:
        super().__init__(source)
        # A run that verifies must not keep shards of an interrupted one that did not.
        self.format = "native" if verify else "native, not verified"
        self.verb = "compress"
        self.metadata = METADATA
        self.has_checksums = True
        self._verify = verify
        for name in source.tensors:
            if ":" in name:
                raise ValueError(f"{source.path}: {name}: native checkpoints have no ':' in names")

    def places(self, name: str) -> Places:
        yield from super().places(name)
        if self._is_candidate(self._source.tensors[name]):
            yield from ((part, 1) for part in part_names(name))

    def tensors(self, name: str) -> Tensors:
        array = self._source.read(name)
        if self._is_candidate(self._source.tensors[name]):
            array = np.ascontiguousarray(array)
            words = encode(array, name, make_layout(array.shape), verify=self._verify)
            if is_worth_keeping(sum(part.nbytes for part in words), array.nbytes):
                return zip(part_names(name), words, strict=True)
        return [(name, array)]

    def itemsize(self, info: TensorInfo) -> int:
        return 4 if self._is_candidate(info) else super().itemsize(info)

    def _is_candidate(self, info: TensorInfo) -> bool:
        return is_candidate(info.shape, info.numpy_dtype)


def _write(source: Source, path: Path, target: _PlainTarget, progress: bool) -> None:
    infos = source.tensors
    shards = plan_shards(path, {name: info.nbytes for name, info in infos.items()})
    job = {
        "writes": f"{target.format} {json.dumps(target.metadata)}",
        "from": str(source.path.resolve()),
        "fingerprint": fingerprint(source),
    }
    total = sum(info.nbytes for info in infos.values())
    with incomplete(path, job), ProgressBar(target.verb, total, show=progress) as bar:

        def leaves(names: Sequence[str]) -> Iterator[Tensors]:
            for name in names:
                yield target.tensors(name)
                bar.update(name, infos[name].nbytes)

        for file, names in shards.items():
            if file.exists():
                bar.update(file.name, sum(infos[name].nbytes for name in names))
                continue
            # Wide types come first, so that each tensor is aligned to its elements, as readers
            # like it.
            names.sort(key=lambda name: -target.itemsize(infos[name]))
            places = (place for name in names for place in target.places(name))
            write_shard(
                file, places, leaves(names), target.metadata, checksums=target.has_checksums
            )
        copy_small_files(source.path, path, without=CONFIG_KEY)
        write_index(path, shards, checksums=target.has_checksums)
