"""Checkpoints from checkpoints, shard by shard."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from df11_jax._files.atomic import new_file
from df11_jax._files.directory import copy_small_files, write_index
from df11_jax._files.journal import fingerprint, incomplete
from df11_jax._files.safetensors import DTYPES, TensorWriter, header_room
from df11_jax._files.source import Source, TensorInfo
from df11_jax._host_codec import encode
from df11_jax._progress import ProgressBar
from df11_jax._select import is_candidate, is_worth_keeping
from df11_jax.checkpoints import _native_checksums
from df11_jax.checkpoints._native_format import METADATA, part_names

# Of what a shard stands for; it is written at about two thirds of that if it is compressed. An
# interruption costs no more.
SHARD_BYTES = 2_000_000_000
_SYNC_BYTES = 1 << 26

Tensors = Iterable[tuple[str, np.ndarray]]
Places = Iterable[tuple[str, int]]


def write_native(
    source: Source,
    path: Path,
    *,
    verify: bool = True,
    threads: int | None = None,
    progress: bool = False,
) -> None:
    """Writes a native checkpoint, with one tensor in memory at a time.

    The same leaves are compressed as by `compress_params`. The directory is complete when its
    index is there; after an interruption, the same call goes on with the shards that are missing.

    Args:
        source: what to compress.
        path: of the directory; new, empty, or interrupted.
        verify: decode each leaf and compare it bit by bit before it is written.
        threads: how many threads to use; None for all that this process may run on.
        progress: show a progress bar.

    Raises:
        FileExistsError: there is something else at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, or has a dtype that cannot be read, or names that the
            format cannot hold.
        RuntimeError: verification failed.
    """
    _write(source, path, _Native(source, verify, threads), progress)


def write_plain(source: Source, path: Path, *, progress: bool = False) -> None:
    """Writes a checkpoint without compression, as Hugging Face's libraries read it.

    In all else like `write_native`.

    Args:
        source: what to decompress.
        path: of the directory; new, empty, or interrupted.
        progress: show a progress bar.

    Raises:
        FileExistsError: there is something else at `path`.
        OSError: reading or writing failed.
        ValueError: the source is corrupt, or has a dtype that cannot be read.
    """
    _write(source, path, _Plain(source), progress)


class _Plain:
    """How leaves are stored plain."""

    def __init__(self, source: Source) -> None:
        for name, info in source.tensors.items():
            if info.dtype not in DTYPES:
                raise ValueError(f"{source.path}: {name}: cannot read the dtype {info.dtype}")
        self._source = source
        self.format = "plain"
        self.verb = "decompress"
        # transformers refuses files that do not say for which library they are.
        self.metadata = {"format": "pt"}
        self.has_checksums = False

    def places(self, name: str) -> Places:
        """Name and number of dimensions of all tensors that a leaf may become."""
        return [(name, len(self._source.tensors[name].shape))]

    def tensors(self, name: str) -> Tensors:
        """The tensors that it becomes."""
        return [(name, self._source.read(name))]

    def itemsize(self, info: TensorInfo) -> int:
        """Bytes of an element of them."""
        return DTYPES[info.dtype].itemsize


class _Native(_Plain):
    """How they are stored compressed, if that makes them smaller."""

    def __init__(self, source: Source, verify: bool, threads: int | None) -> None:
        super().__init__(source)
        # What was not verified is not to be taken over by a run that verifies.
        self.format = "native" if verify else "native, not verified"
        self.verb = "compress"
        self.metadata = METADATA
        self.has_checksums = True
        self._verify = verify
        self._threads = threads
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
            words = encode(array, name, verify=self._verify, threads=self._threads)
            if is_worth_keeping(sum(part.nbytes for part in words), array.nbytes):
                return zip(part_names(name), words, strict=True)
        return [(name, array)]

    def itemsize(self, info: TensorInfo) -> int:
        return 4 if self._is_candidate(info) else super().itemsize(info)

    def _is_candidate(self, info: TensorInfo) -> bool:
        return is_candidate(info.shape, info.numpy_dtype)


def plan_shards(path: Path, nbytes: Mapping[str, int]) -> dict[Path, list[str]]:
    """Which leaves go into which file: in order, up to `SHARD_BYTES` together.

    Args:
        path: of the directory.
        nbytes: of the leaves.

    Returns:
        The files, named as Hugging Face does, and their leaves.
    """
    shards: list[list[str]] = []
    room = -1
    for name, size in nbytes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    count = len(shards)
    return {
        path / f"model-{i + 1:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(shards)
    }


def write_shard(
    path: Path,
    places: Places,
    leaves: Iterable[Tensors],
    metadata: Mapping[str, str],
    *,
    checksums: bool,
) -> None:
    """Writes one file, which is there only when it is complete.

    Args:
        path: of the file.
        places: name and number of dimensions of all tensors that there may be.
        leaves: the tensors of leaf after leaf; the next leaf is asked for while one is written.
        metadata: strings for the header.
        checksums: whether to add those of native files to them.
    """
    places = list(places)
    keys = {name: _native_checksums.metadata_key(name) for name, _ in places} if checksums else {}
    room = header_room(places, {**metadata, **{key: "1c291ca3" for key in keys.values() if key}})
    with new_file(path) as file, ThreadPoolExecutor(1) as writing_thread:
        writer = TensorWriter(file, room, metadata)
        synced = 0

        def write(tensors: Tensors) -> None:
            nonlocal synced
            for name, array in tensors:
                writer.add(name, array)
                if key := keys.get(name):
                    writer.metadata[key] = _native_checksums.checksum(name, array)
            # Not all at the end, when nothing else is left to do.
            if file.tell() - synced > _SYNC_BYTES:
                file.flush()
                os.fsync(file.fileno())
                synced = file.tell()

        writing = None
        for tensors in leaves:
            if writing is not None:
                writing.result()
            writing = writing_thread.submit(write, tensors)
        if writing is not None:
            writing.result()
        writer.finish()


def _write(source: Source, path: Path, target: _Plain, progress: bool) -> None:
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
            # Wide types first: so each tensor is aligned to its elements, as readers like it.
            names.sort(key=lambda name: -target.itemsize(infos[name]))
            places = (place for name in names for place in target.places(name))
            write_shard(
                file, places, leaves(names), target.metadata, checksums=target.has_checksums
            )
        copy_small_files(source.path, path)
        write_index(path, shards, checksums=target.has_checksums)
