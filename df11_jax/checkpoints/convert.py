"""Writes a checkpoint in another format, with little of it in memory at a time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from df11_jax._files.atomic import directory_beside
from df11_jax._files.directory import INDEX, copy_small_files, write_index
from df11_jax._files.folder_source import FolderSource
from df11_jax._files.journal import Job, incomplete
from df11_jax._files.safetensors import Tensor, check_name
from df11_jax._files.source import Arrangement, Source, TensorInfo, unchanged
from df11_jax._host_arrays import cpu_device
from df11_jax._host_codec import encode
from df11_jax._layout import make_layout
from df11_jax._progress import ProgressBar
from df11_jax._select import is_candidate, is_worth_keeping
from df11_jax.checkpoints._load import load
from df11_jax.checkpoints._native_format import (
    METADATA,
    SOURCE,
    SOURCE_PREFIX,
    compressed_leaf,
    part_names,
)
from df11_jax.checkpoints._shard_files import Places, StoredLeaf, plan_shards, write_shard
from df11_jax.checkpoints._tree import Structure, nest
from df11_jax.checkpoints.cast import CastCheckpoint
from df11_jax.published.detect import CONFIG_KEY


def write_native(
    source: Source,
    path: Path,
    *,
    verify: bool = True,
    progress: bool = False,
) -> None:
    """Writes a native checkpoint, with one tensor in memory at a time.

    It compresses the tensors that `compress_params` would. Each file of the source becomes one of
    the same name, or of those that Hugging Face gives to shards if one of several has the name of a
    whole model; it keeps the strings in its header. After an interruption, the same call
    writes the files that are missing.

    Args:
        source: the checkpoint to compress.
        path: the path of the directory, which is new, empty, or left behind by an interruption; or
            of a new file, if it ends in `.safetensors`, which only a single file can become.
        verify: whether to decode each tensor and compare it bit by bit before it is written.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: there is something else at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, was changed while it was read, has names that the format
            cannot hold, or is a directory, and `path` that of a file.
        RuntimeError: verification failed.
    """
    _write(source, path, _NativeTarget(source, verify), progress)


def write_plain(source: Source, path: Path, *, progress: bool = False) -> None:
    """Writes a checkpoint without compression, as Hugging Face's libraries read it.

    Memory, and what happens after an interruption, are as for `write_native`. Files have the names
    and the strings in their headers that they had before compression, if that is known, but for
    names that other libraries would take for those of whole models.

    Args:
        source: the checkpoint to decompress.
        path: the path of the directory, which is new, empty, or left behind by an interruption; or
            of a new file, if it ends in `.safetensors`, which only a single file can become.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: there is something else at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, was changed while it was read, or is a directory, and
            `path` that of a file.
    """
    _write(source, path, _PlainTarget(source), progress)


def write_orbax(source: Source, path: Path, *, progress: bool = False) -> None:
    """Writes a checkpoint that `df11_jax.orbax.DF11Restore` restores.

    All tensors are in memory at once, compressed. The folder gets its name when it is complete;
    after an interruption, everything has to be done again.

    Args:
        source: the checkpoint to compress.
        path: the path of the new folder.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: there is something at `path`, or before all is written.
        ImportError: Orbax is not installed.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, was changed while it was read, or has a dtype that numpy
            lacks, or a tensor whose name is empty; or `path` is not UTF-8.
    """
    from df11_jax.orbax.items import check_path, save_item  # Orbax is optional

    if os.path.lexists(path):
        what = "is a link to nothing" if not path.exists() else "exists already"
        raise FileExistsError(f"{path}: {what}; expected a new directory")
    if "" in source.tensors:
        raise ValueError(
            f"{source.path}: '': a tensor without a name, which would get another one in an Orbax "
            "checkpoint; rename it"
        )
    check_path(path.resolve())
    source.check_current()
    with jax.default_device(cpu_device()):
        params = load(source, progress=progress)
    source.check_current()
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not at the path itself: Orbax takes what others are writing there for something left behind.
    with directory_beside(path) as directory:
        save_item(params, directory / "item")
        try:
            os.rename(directory / "item", path)
        except OSError as error:
            if not os.path.lexists(path):
                raise
            raise FileExistsError(f"{path}: was written by another process meanwhile") from error


class _PlainTarget:
    """A checkpoint to be written whose leaves are stored plain."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.format = "plain"
        self.verb = "decompress"
        self.has_checksums = False

    def metadata(self, source_metadata: Mapping[str, str]) -> Mapping[str, str]:
        """The strings in the header of a file.

        Args:
            source_metadata: those of the file that it is made of, or was before compression.
        """
        # transformers 4 refuses files that do not name the library that they are for.
        return source_metadata or {"format": "pt"}

    def index_metadata(self, source_metadata: Mapping[str, Any]) -> Mapping[str, Any]:
        """The metadata of the index.

        Args:
            source_metadata: that of the index of the source, or of that before compression.
        """
        return source_metadata

    def places(self, name: str) -> Places:
        """The names and numbers of dimensions of all tensors that a leaf may be stored as."""
        return [(name, len(self._source.tensors[name].shape))]

    def leaf(self, name: str) -> StoredLeaf:
        """A leaf as it is to be written."""
        info = self._source.tensors[name]
        return StoredLeaf([Tensor(name, info.dtype, info.shape, self._source.read(name))])

    def itemsize(self, info: TensorInfo) -> int:
        """The bytes of an element of the tensors that a leaf may be stored as."""
        return 1 if info.numpy_dtype is None else info.numpy_dtype.itemsize


class _NativeTarget(_PlainTarget):
    """A checkpoint to be written whose leaves are compressed if that makes them smaller."""

    def __init__(self, source: Source, verify: bool) -> None:
        super().__init__(source)
        # A run that verifies must not keep shards of an interrupted one that did not.
        self.format = "native" if verify else "native, not verified"
        self.verb = "compress"
        self.has_checksums = True
        self._verify = verify
        for name in source.tensors:
            if ":" in name:
                raise ValueError(f"{source.path}: {name}: native checkpoints have no ':' in names")
        nest(dict.fromkeys(source.tensors), Structure(), str(source.path))  # as readers do it

    def metadata(self, source_metadata: Mapping[str, str]) -> Mapping[str, str]:
        kept = {f"{SOURCE_PREFIX}{key}": value for key, value in source_metadata.items()}
        return {**METADATA, **kept}

    def index_metadata(self, source_metadata: Mapping[str, Any]) -> Mapping[str, Any]:
        return {SOURCE: source_metadata} if source_metadata else {}

    def places(self, name: str) -> Places:
        yield from super().places(name)
        if self._is_candidate(self._source.tensors[name]):
            yield from ((part, 1) for part in part_names(name))

    def leaf(self, name: str) -> StoredLeaf:
        if not self._is_candidate(self._source.tensors[name]):
            return super().leaf(name)
        array = np.ascontiguousarray(self._source.read(name))
        layout = make_layout(array.shape)
        payload = encode(array, name, layout, verify=self._verify)
        if is_worth_keeping(sum(part.nbytes for part in payload), array.nbytes):
            return compressed_leaf(name, payload, layout)
        return StoredLeaf([Tensor.of(name, array)])

    def itemsize(self, info: TensorInfo) -> int:
        return 4 if self._is_candidate(info) else super().itemsize(info)

    def _is_candidate(self, info: TensorInfo) -> bool:
        return is_candidate(info.shape, info.numpy_dtype)


def _write(source: Source, path: Path, target: _PlainTarget, progress: bool) -> None:
    source.check_current()
    for name in source.tensors:
        for place, _ in target.places(name):
            check_name(place)
    write = _write_file if path.suffix == ".safetensors" else _write_directory
    write(source, path, target, progress)


def _progress_bar(source: Source, target: _PlainTarget, progress: bool) -> ProgressBar:
    total = sum(info.nbytes for info in source.tensors.values())
    return ProgressBar(target.verb, total, show=progress)


def _write_file(source: Source, path: Path, target: _PlainTarget, progress: bool) -> None:
    if not (isinstance(source, FolderSource) and source.folder.is_file):
        raise ValueError(
            f"{path}: is a name for a file, and {source.path} is a directory; expected the name of "
            "a new directory"
        )
    if os.path.lexists(path):
        raise FileExistsError(f"{path}: exists already; expected a new file. Nothing was changed")
    arrangement = source.arrangement()
    assert arrangement is not None, "a file is arranged"
    (metadata,) = arrangement.metadata.values() or [{}]
    with _progress_bar(source, target, progress) as bar:
        _write_shard(source, path, list(source.tensors), metadata, target, bar)


def _write_directory(source: Source, path: Path, target: _PlainTarget, progress: bool) -> None:
    arrangement = source.arrangement() or _arrange(source.tensors)
    # A run that rounds must not keep shards of an interrupted one that did not.
    rounds = ", rounded" if isinstance(source, CastCheckpoint) else ""
    job: Job = {
        "writes": f"{target.format} {json.dumps(target.metadata({}))}",
        "from": f"{source.path.resolve()}{rounds}",
        "files": source.fingerprint(),
    }
    with incomplete(path, job), _progress_bar(source, target, progress) as bar:
        for shard, names in arrangement.shards.items():
            file = path / shard
            if file.exists():
                bar.update(shard, sum(source.tensors[name].nbytes for name in names))
                continue
            metadata = arrangement.metadata.get(shard, {})
            _write_shard(source, file, names, metadata, target, bar)
        if isinstance(source, FolderSource):
            config = source.model_config()
            kept = {key: value for key, value in config.items() if key != CONFIG_KEY}
            copy_small_files(source.folder, path, kept)
        source.check_current()
        # Where there is no tensor, no file says that it is a checkpoint, but for an index.
        index_file = arrangement.index_file if arrangement.shards else INDEX
        if index_file is not None:
            write_index(
                path / index_file,
                [path / shard for shard in arrangement.shards],
                checksums=target.has_checksums,
                metadata=target.index_metadata(arrangement.index_metadata),
            )


def _write_shard(
    source: Source,
    path: Path,
    names: Sequence[str],
    source_metadata: Mapping[str, str],
    target: _PlainTarget,
    bar: ProgressBar,
) -> None:
    # Wide types come first, so that each tensor is aligned to its elements, as readers like it.
    names = sorted(names, key=lambda name: -target.itemsize(source.tensors[name]))

    def leaves() -> Iterator[StoredLeaf]:
        for name in names:
            yield target.leaf(name)
            bar.update(name, source.tensors[name].nbytes)

    places = (place for name in names for place in target.places(name))
    metadata = target.metadata(source_metadata)
    with unchanged(source):
        write_shard(
            path,
            places,
            leaves(),
            metadata,
            checksums=target.has_checksums,
            check=source.check_unchanged,
        )


def _arrange(infos: Mapping[str, TensorInfo]) -> Arrangement:
    """Files for tensors that do not lie in safetensors files."""
    shards = plan_shards(Path(), {name: info.nbytes for name, info in infos.items()})
    return Arrangement({file.name: names for file, names in shards.items()}, {}, INDEX, {})
