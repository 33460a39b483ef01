"""Pytrees to native checkpoints."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._files.directory import INDEX, JOURNAL, write_index
from df11_jax._files.journal import incomplete, replacement
from df11_jax._files.safetensors import Tensor, check_name, dtype_name
from df11_jax._host_arrays import to_host
from df11_jax._host_codec import verify
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
            Where there is None or an empty dict, that is kept.
        path: the path of a file, if it ends in `.safetensors`; otherwise of a directory, new or
            empty, which gets one shard or several.
        max_shard_size: the most bytes of a shard, as a number or a text such as `"5GB"`; a leaf
            that has more gets a shard of its own.
        overwrite: whether to replace a whole directory that holds a native checkpoint. The old one
            is there until the new one is complete.

    Raises:
        FileExistsError: the directory is not empty, and is not to be replaced or does not hold a
            native checkpoint.
        ValueError: a key contains `/` or `:` or is of another type, a container is not a dict,
            there is no name for a leaf's dtype, or a leaf could not be loaded again, since it is
            corrupt or is an empty stack; the message names it.
    """
    leaves, structure = flatten(params)
    leaves = {
        name: leaf if hasattr(leaf, "nbytes") else jnp.asarray(leaf)
        for name, leaf in leaves.items()
    }
    if any(structure) and not leaves:
        raise ValueError("there is no array in it, so that there is nothing to save")
    for name in (*leaves, *structure.none, *structure.empty):
        check_name(name)
    for name, leaf in leaves.items():
        if not isinstance(leaf, DF11Array):
            dtype_name(name, leaf.dtype)
        elif 0 in leaf.stack_shape:
            raise ValueError(f"{name}: is an empty stack, {leaf!r}, of which nothing can be saved")
    most = parse_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"max_shard_size is {most!r}, expected a number of bytes, or '5GB'")
    path = Path(path)
    if path.suffix == ".safetensors":
        _write_leaves(path, leaves, structure)
        return
    job = {"writes": "native", "from": "df11_jax.checkpoints.save"}
    names = os.listdir(path) if path.is_dir() else []
    if overwrite and names and JOURNAL not in names:
        _check_is_native(path)
        writing = replacement(path, job)
    else:
        writing = incomplete(path, job)
    with writing as directory:
        # Shards that an interrupted run has left may hold other parameters.
        for file in directory.glob("model-*-of-*.safetensors"):
            file.unlink()
        sizes = {name: _nbytes(leaf) for name, leaf in leaves.items()}
        shards = plan_shards(directory, sizes, most)
        for file, names in shards.items():
            _write_leaves(file, {name: leaves[name] for name in names}, structure)
            structure = Structure()  # that of the whole tree, which one file has
        write_index(directory / INDEX, shards, checksums=True)


def _check_is_native(path: Path) -> None:
    """Raises FileExistsError if a directory holds anything but a native checkpoint."""
    problem = ""
    try:
        if open_checkpoint(path).format == "native" or os.listdir(path) == [INDEX]:  # no arrays
            return
    except (OSError, ValueError) as error:
        problem = f" ({error})"
    raise FileExistsError(
        f"{path}: is not the directory of a native checkpoint, which overwrite=True replaces"
        f"{problem}; nothing was changed"
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
