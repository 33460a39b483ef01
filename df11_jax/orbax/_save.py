"""From parameters to the tree and the metadata that Orbax saves."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import is_df11
from df11_jax._compress import align_layers, compress_leaves
from df11_jax._decode import path_name
from df11_jax._files import crc32
from df11_jax._host_arrays import cpu_device, to_host
from df11_jax._identity import identity
from df11_jax._leaves import check_elements, is_array, plain_shape
from df11_jax._select import Selection
from df11_jax.orbax import _describe, _leaf_arrays, _manifest


def to_orbax(
    params: PyTree, compress: Mapping[str, Any] | None, custom_metadata: Mapping[str, Any] | None
) -> tuple[PyTree, dict[str, Any]]:
    """Makes the tree that Orbax is to save, and the metadata that goes with it.

    Args:
        params: parameters, compressed or not.
        compress: arguments of `compress_params`; None to save all leaves as they are.
        custom_metadata: entries that the user adds to Orbax's metadata of the item.

    Returns:
        The tree, and the user's metadata together with the manifest. The tree has a dict of
        arrays for each compressed leaf. It has no arrays without elements, which Orbax cannot
        save.

    Raises:
        TypeError: a leaf is neither an array nor a number nor a text, or of a type that Orbax
            does not save.
        ValueError: a leaf is a shape, is traced or was deleted, its arrays do not fit its shape,
            two leaves have the same name in Orbax, or the user's metadata has an entry of the same
            name as the manifest.
    """
    if custom_metadata is not None and _manifest.KEY in custom_metadata:
        raise ValueError(f"custom_metadata has the key {_manifest.KEY!r}, which df11_jax uses")
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_df11):
        check_elements(path_name(path), leaf)
    if compress is not None:
        params = _compress_on_host(params, compress)
    manifest, values = _describe.describe(params)
    for leaf, value in zip(manifest.leaves, values, strict=True):
        if leaf.is_compressed:
            _layout.check_payload(value.payload, value.layout, leaf.path)
            _leaf_arrays.check_header(value, leaf.path)
    arrays = [
        _leaf_arrays.checked_arrays(value, leaf.dtype)
        for leaf, value in zip(manifest.leaves, values, strict=True)
    ]
    leaves = tuple(
        dataclasses.replace(leaf, crc32=checksum if leaf.dtype else None)
        for leaf, checksum in zip(manifest.leaves, crc32.leaf_checksums(arrays), strict=True)
    )
    entry = dataclasses.replace(manifest, leaves=leaves).to_json()
    split = jax.tree.map(
        lambda x: _leaf_arrays.to_stored(x) if is_df11(x) else x, params, is_leaf=is_df11
    )
    stored = jax.tree.map(lambda array: array if np.size(array) else None, split)
    return stored, {**(custom_metadata or {}), _manifest.KEY: entry}


def _compress_on_host(params: PyTree, options: Mapping[str, Any]) -> PyTree:
    """Compresses leaf by leaf; the compressed leaves stay on the host."""
    selection, others = Selection.split(options)

    with_paths, treedef = jax.tree.flatten_with_path(params, is_leaf=is_df11)
    leaves = [leaf for _, leaf in with_paths]
    names = [path_name(path) for path, _ in with_paths]
    shapes = [(name, plain_shape(leaf)) for name, leaf in zip(names, leaves, strict=True)]
    compressed = [name for name, leaf in zip(names, leaves, strict=True) if is_df11(leaf)]
    selection.check("DF11Save", shapes, compressed=compressed, stacklevel=1)
    # Tied leaves go together, and stay tied.
    tied: dict[Hashable, list[int]] = {}
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if is_array(leaf):
            if selection.admits(name, leaf.shape, leaf.dtype):
                tied.setdefault(identity(leaf), []).append(i)
    for members in tied.values():
        whole = _gather(leaves[members[0]])
        with jax.default_device(cpu_device()):
            small = compress_leaves([(names[i], whole) for i in members], selection, **others)
        for i, leaf in zip(members, small, strict=True):
            if is_df11(leaf):
                leaves[i] = jax.tree.map(np.asarray, leaf)
    leaves = [selection.to_front(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    selection.warn_if_futile("DF11Save", zip(names, leaves, strict=True), stacklevel=1)
    align_layers(names, leaves)
    return jax.tree.unflatten(treedef, leaves)


def _gather(leaf: Any) -> np.ndarray:
    """All elements of a leaf on the host, wherever they are."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return to_host(leaf)
