"""Pytrees to native checkpoints."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._brief import brief, listed
from df11_jax._files.atomic import new_directory
from df11_jax._files.directory import INDEX, JOURNAL, write_index
from df11_jax._files.journal import incomplete
from df11_jax._files.safetensors import Tensor, check_name, dtype_name
from df11_jax._host_arrays import to_host
from df11_jax._host_codec import verify
from df11_jax._leaves import check_elements
from df11_jax._units import parse_bytes
from df11_jax.checkpoints._native_format import (
    METADATA,
    STRUCTURE,
    compressed_leaf,
    part_names,
)
from df11_jax.checkpoints._open import open_checkpoint
from df11_jax.checkpoints._shard_files import Places, StoredLeaf, plan_shards, write_shard
from df11_jax.checkpoints._tree import Structure, flatten


def save(
    params: PyTree,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "2GB",
    overwrite: bool = False,
) -> None:
    """Saves parameters as a native checkpoint.

    A file of that name is replaced only when the new one is complete. A directory is complete when
    it has an index. Compressed leaves are verified before they are written.

    Args:
        params: nested dicts of arrays and `DF11Array`s, with keys that are strings or integers.
            Where there is None or an empty dict, that is kept. Numbers are kept with 64 bits.
        path: the path of a file, if it ends in `.safetensors`; otherwise of a directory, new or
            empty, which gets one shard or several.
        max_shard_size: the most bytes of a shard, as a number or a text such as `"5GB"`; a leaf
            that has more gets a shard of its own.
        overwrite: whether to replace a whole directory that holds a native checkpoint and nothing
            else. The old one is there until the new one is complete.

    Raises:
        BlockingIOError: another process is writing to the directory.
        FileExistsError: the directory is not empty, and is not to be replaced or holds anything
            but a native checkpoint.
        OSError: writing failed.
        ValueError: a key contains `/` or `:` or is of another type, a container is not a dict, a
            leaf is neither an array nor a number, is traced or was deleted, there is no name for
            its dtype, it is spread over several processes (which `df11_jax.orbax` saves), or it
            could not be loaded again, since it is corrupt or is an empty stack; the message names
            it.
    """
    leaves, structure = flatten(params)
    leaves = {name: _as_array(name, leaf) for name, leaf in leaves.items()}
    if any(structure) and not leaves:
        raise ValueError("there is no array in it, so that there is nothing to save")
    for name in itertools.chain(*structure):
        check_name(name)
    for name, leaf in leaves.items():
        if not all(getattr(a, "is_fully_addressable", True) for a in jax.tree.leaves(leaf)):
            raise ValueError(
                f"{name}: is spread over several processes, of which none can write all of it. "
                "df11_jax.orbax saves such leaves: DF11Save"
            )
        if not isinstance(leaf, DF11Array):
            check_name(name)
            dtype_name(name, leaf.dtype)
        elif 0 in leaf.stack_shape:
            raise ValueError(f"{name}: is an empty stack, {leaf!r}, of which nothing can be saved")
        else:
            for part in part_names(name):
                check_name(part)
    most = parse_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"max_shard_size is {most!r}, expected a number of bytes, or '5GB'")
    path = Path(path)
    if path.suffix == ".safetensors":
        _write_leaves(path, leaves, structure)
        return
    job = {"writes": "native", "from": "df11_jax.checkpoints.save"}
    with contextlib.ExitStack() as stack:
        is_whole = path.is_dir() and any(path.iterdir()) and not (path / JOURNAL).exists()
        if overwrite and is_whole:
            _check_is_replaceable(path)
            path = stack.enter_context(new_directory(path))
        try:
            stack.enter_context(incomplete(path, job))
        except FileExistsError as error:
            if is_whole:
                error.add_note("df11_jax: overwrite=True replaces a whole native checkpoint")
            raise
        # Shards that an interrupted run has left may hold other parameters.
        for file in path.glob("model-*-of-*.safetensors"):
            file.unlink()
        sizes = {name: _nbytes(leaf) for name, leaf in leaves.items()}
        shards = plan_shards(path, sizes, most)
        for file, names in shards.items():
            _write_leaves(file, {name: leaves[name] for name in names}, structure)
            structure = Structure()  # that of the whole tree, which one file has
        write_index(path / INDEX, shards, checksums=True)


def _as_array(name: str, leaf: Any) -> Any:
    check_elements(name, leaf)
    if hasattr(leaf, "nbytes"):
        return leaf
    if not isinstance(leaf, int | float):
        raise ValueError(
            f"{name}: expected an array or a number, got {type(leaf).__name__}, which safetensors "
            "files cannot hold"
        )
    array = np.asarray(leaf)  # jax would round it
    if array.dtype == object:
        raise ValueError(f"{name}: expected a number of at most 64 bits, got {brief(leaf)}")
    return array


def _check_is_replaceable(path: Path) -> None:
    """Raises FileExistsError if a directory holds anything but a native checkpoint."""
    refusal = f"{path}: overwrite=True replaces the whole directory of a native checkpoint, "
    try:
        source = open_checkpoint(path)
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{refusal}which this is not ({error}); nothing was changed"
        ) from None
    # Without arrays, there is nothing but an index.
    if source.format != "native" and source.tensors:
        raise FileExistsError(f"{refusal}and this one is {source.format}; nothing was changed")
    others = sorted(
        name
        for name in os.listdir(path)
        if name != INDEX and not re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)
    )
    if others:
        raise FileExistsError(
            f"{refusal}and this one has other files, which would be lost: "
            f"{listed(others)}. Nothing was changed"
        )
    if path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(
            f"{refusal}and this process works in this one. Nothing was changed; change the working "
            "directory"
        )


def _write_leaves(path: Path, leaves: Mapping[str, Any], structure: Structure) -> None:
    metadata = METADATA | ({STRUCTURE: structure.to_json()} if any(structure) else {})

    def places() -> Places:
        for name, leaf in leaves.items():
            if isinstance(leaf, DF11Array):
                yield from zip(part_names(name), (part.ndim for part in leaf.payload), strict=True)
            else:
                yield name, leaf.ndim

    def stored() -> Iterator[StoredLeaf]:
        for name, leaf in sorted(leaves.items(), key=lambda item: -_itemsize(item[1])):
            if isinstance(leaf, DF11Array):
                payload = [to_host(array) for array in leaf.payload]
                verify(payload, leaf.layout, name)
                yield compressed_leaf(name, payload, leaf.layout)
            else:
                yield StoredLeaf([Tensor.of(name, to_host(leaf))])

    write_shard(path, places(), stored(), metadata, checksums=True)


def _nbytes(leaf: Any) -> int:
    return leaf.compressed_nbytes if is_df11(leaf) else leaf.nbytes


def _itemsize(leaf: Any) -> int:
    return 4 if is_df11(leaf) else leaf.dtype.itemsize
