"""Pytrees from and to checkpoints."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._compress import compress_leaf
from df11_jax._decode import path_name
from df11_jax._files.directory import write_index
from df11_jax._files.journal import incomplete
from df11_jax._files.source import Source
from df11_jax._host_arrays import cpu_device, to_host
from df11_jax._progress import ProgressBar
from df11_jax._select import Selection
from df11_jax.checkpoints._native_format import (
    METADATA,
    part_names,
    to_device,
)
from df11_jax.checkpoints._open import Shapes, open_checkpoint
from df11_jax.checkpoints._shard_files import (
    Places,
    Tensors,
    plan_shards,
    write_shard,
)


@runtime_checkable
class LeafSource(Protocol):
    """A checkpoint of a format that stores leaves as this library has them in memory."""

    def load(self, name: str) -> DF11Array | Array | np.ndarray:
        """One leaf as it is stored, on the default device."""


def load(
    checkpoint: str | os.PathLike[str] | Source,
    *,
    shapes: Shapes | None = None,
    device: jax.Device | jax.sharding.Sharding | None = None,
    progress: bool = False,
) -> PyTree:
    """Loads a checkpoint of any format, compressed, onto a device.

    Leaves of native checkpoints, which `save` and `df11-jax compress` write, and of Orbax's come
    back as they were saved. Leaves of other formats are compressed as `compress_params` does it:
    float32 ones stay as they are, and `compress_params(..., cast=True)` can round them. The leaves
    are loaded one by one, so that the host holds what one of them needs (of a published checkpoint,
    one unit), and the device holds nothing twice.

    Args:
        checkpoint: the path of its directory or file; or a checkpoint that is open already.
        shapes: the model's shapes, which only published checkpoints may need; see
            `df11_jax.published.Checkpoint`.
        device: the device or sharding of all arrays, as for `jax.device_put`; None for the default
            device. Each array gets that sharding, so one over several devices has to replicate.
        progress: whether to show a progress bar.

    Returns:
        Arrays and `DF11Array`s by name; nested dicts where names contain `/`.

    Raises:
        FileNotFoundError: nothing is there, or a shard is missing.
        ValueError: the checkpoint has none of the formats, is of another version, or is damaged;
            the message names the file and the leaf. Or `device` does not suit an array; a note
            names the leaf.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        source = open_checkpoint(checkpoint, shapes=shapes)
    else:
        source = checkpoint
    total = sum(info.nbytes for info in source.tensors.values())
    params: dict[str, Any] = {}
    with ProgressBar("load", total, show=progress) as bar:
        for name, info in source.tensors.items():
            *parents, last = name.split("/")
            place = params
            for key in parents:
                place = place.setdefault(key, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{source.path}: {name}: {key} is a leaf as well")
            if last in place:
                raise ValueError(f"{source.path}: {name}: is a leaf, and there are leaves below it")
            place[last] = _load_leaf(source, name, device)
            bar.update(name, info.nbytes)
    return params


def save(params: PyTree, path: str | os.PathLike[str]) -> None:
    """Saves parameters as a native checkpoint.

    A file of that name is replaced only when the new one is complete. A directory is complete when
    it has an index.

    Args:
        params: nested dicts with string keys of arrays and `DF11Array`s.
        path: the path of a file, if it ends in `.safetensors`; otherwise of a directory, new or
            empty, which gets shards of up to 2 GB.

    Raises:
        FileExistsError: the directory is not empty.
        ValueError: a name contains `/` or `:`, a container is not a dict, or there is no name for
            a leaf's dtype.
    """
    leaves = _named_leaves(params)
    path = Path(path)
    if path.suffix == ".safetensors":
        _write_leaves(path, leaves)
        return
    shards = plan_shards(path, {name: leaf.nbytes for name, leaf in leaves.items()})
    with incomplete(path, {"writes": "native", "from": "df11_jax.checkpoints.save"}):
        # Shards that an interrupted run has left may hold other parameters.
        for file in path.glob("model-*-of-*.safetensors"):
            file.unlink()
        for file, names in shards.items():
            _write_leaves(file, {name: leaves[name] for name in names})
        write_index(path, shards, checksums=True)


def _named_leaves(params: PyTree) -> dict[str, Any]:
    leaves = {}
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=is_df11):
        parts = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        if not keys or len(parts) != len(keys) or set("/:") & set("".join(parts)):
            raise ValueError(
                f"{path_name(keys)}: only nested dicts with keys free of '/' and ':' can be saved"
            )
        leaves["/".join(parts)] = leaf if hasattr(leaf, "nbytes") else jnp.asarray(leaf)
    return leaves


def _write_leaves(path: Path, leaves: Mapping[str, Any]) -> None:
    def places() -> Places:
        for name, leaf in leaves.items():
            if isinstance(leaf, DF11Array):
                yield from zip(part_names(name), (part.ndim for part in leaf.payload), strict=True)
            else:
                yield name, leaf.ndim

    def tensors() -> Iterator[Tensors]:
        for name, leaf in sorted(leaves.items(), key=lambda item: -_itemsize(item[1])):
            if isinstance(leaf, DF11Array):
                yield [
                    (part, to_host(array))
                    for part, array in zip(part_names(name), leaf.payload, strict=True)
                ]
            else:
                yield [(name, to_host(leaf))]

    write_shard(path, places(), tensors(), METADATA, checksums=True)


def _load_leaf(
    source: Source, name: str, device: jax.Device | jax.sharding.Sharding | None
) -> DF11Array | Array | np.ndarray:
    if device is None:
        return _read_leaf(source, name)
    with jax.default_device(cpu_device()):
        leaf = _read_leaf(source, name)
    try:
        # Arrays of types that jax lacks are on the host; `device_put` would lose bits of them.
        return jax.tree.map(
            lambda array: jax.device_put(array, device) if isinstance(array, jax.Array) else array,
            leaf,
        )
    except Exception as error:
        error.add_note(f"df11_jax: {source.path}: while placing the leaf {name}")
        raise


def _read_leaf(source: Source, name: str) -> DF11Array | Array | np.ndarray:
    if isinstance(source, LeafSource):
        return source.load(name)
    array = source.read(name)
    selection = Selection()
    leaf = compress_leaf(name, array, selection) if selection.has(name, array) else array
    return leaf if is_df11(leaf) else to_device(array)


def _itemsize(leaf: Any) -> int:
    return 4 if is_df11(leaf) else leaf.dtype.itemsize
