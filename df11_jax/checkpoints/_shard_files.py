"""The shards of a checkpoint: which leaves each holds, and how one is written."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from df11_jax._files.atomic import new_file
from df11_jax._files.safetensors import Tensor, TensorWriter, header_room
from df11_jax.checkpoints import _native_checksums

# The most bytes of the leaves of a shard, unless one leaf has more. An interruption costs no more
# than one shard.
SHARD_BYTES = 2_000_000_000
_SYNC_BYTES = 1 << 26

Places = Iterable[tuple[str, int]]


class StoredLeaf(NamedTuple):
    """A leaf, as it is to be written.

    Attributes:
        tensors: the tensors that it is stored as.
        checksums: the checksums of those tensors whose checksums are not those of their bytes.
    """

    tensors: Iterable[Tensor]
    checksums: Mapping[str, str] = MappingProxyType({})


def plan_shards(
    path: Path, nbytes: Mapping[str, int], shard_bytes: int | None = None
) -> dict[Path, list[str]]:
    """Divides leaves among files in their order.

    Args:
        path: the path of the directory.
        nbytes: the bytes of each leaf, by its name.
        shard_bytes: the most bytes of each file, unless one leaf has more; None for `SHARD_BYTES`.

    Returns:
        The files, with names as Hugging Face gives them, and the names of their leaves.
    """
    shards: list[list[str]] = []
    most = SHARD_BYTES if shard_bytes is None else shard_bytes
    room = -1
    for name, size in nbytes.items():
        if size > room:
            shards.append([])
            room = most
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
    leaves: Iterable[StoredLeaf],
    metadata: Mapping[str, str],
    *,
    checksums: bool,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes one file, which gets its name only when it is complete.

    Args:
        path: the path of the file.
        places: the names and numbers of dimensions of all tensors that there may be.
        leaves: leaf after leaf; while one is written, the next is computed.
        metadata: the strings for the header.
        checksums: whether to add checksums to them, as native files have them.
        check: a function that raises an error if what was written must not get the name.
    """
    places = list(places)
    keys = {name: _native_checksums.metadata_key(name) for name, _ in places} if checksums else {}
    room = header_room(places, {**metadata, **{key: "1c291ca3" for key in keys.values() if key}})
    with new_file(path) as file, ThreadPoolExecutor(1) as writing_thread:
        writer = TensorWriter(file, room, metadata)
        synced = 0

        def write(leaf: StoredLeaf) -> None:
            nonlocal synced
            for tensor in leaf.tensors:
                writer.add(tensor)
                if key := keys.get(tensor.name):
                    known = leaf.checksums.get(tensor.name)
                    writer.metadata[key] = known or _native_checksums.checksum(tensor)
            # Syncing everything at the end would leave the processor idle meanwhile.
            if file.tell() - synced > _SYNC_BYTES:
                file.flush()
                os.fsync(file.fileno())
                synced = file.tell()

        writing = None
        for leaf in leaves:
            if writing is not None:
                writing.result()
            writing = writing_thread.submit(write, leaf)
        if writing is not None:
            writing.result()
        writer.finish()
        check()
