"""Pytrees of parameters, compressed or not, in one safetensors file.

A compressed leaf at path `a/b` is five tensors, `a/b:header` to `a/b:sign_mantissa`; its header
holds its shape, so the file describes itself. Other leaves are tensors under their paths.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name

_METADATA = {"format": "df11_jax", "version": str(_layout.FORMAT_VERSION)}


def save_file(params: PyTree, path: str | os.PathLike[str]) -> None:
    """Saves parameters; a file of that name is replaced only when the new one is complete.

    Args:
        params: nested dicts with string keys of arrays and `DF11Array`s.
        path: of the file, usually `*.safetensors`.

    Raises:
        ValueError: a name contains `/` or `:`, or a container is not a dict.
    """
    from safetensors.flax import save_file as save

    tensors: dict[str, jax.Array] = {}
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=is_df11):
        name = path_name(keys)
        if not all(isinstance(key, jax.tree_util.DictKey) for key in keys) or any(
            set("/:") & set(str(key.key)) for key in keys
        ):
            raise ValueError(
                f"{name}: only nested dicts with keys free of '/' and ':' can be saved"
            )
        if isinstance(leaf, DF11Array):
            for part, array in zip(_layout.PAYLOAD, leaf.payload, strict=True):
                tensors[f"{name}:{part}"] = array
        else:
            tensors[name] = jax.numpy.asarray(leaf)
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save(tensors, partial, metadata=_METADATA)
        partial.chmod(mode)  # safetensors leaves files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_file(path: str | os.PathLike[str]) -> PyTree:
    """Loads what `save_file` saved, onto the default device.

    Args:
        path: of the file.

    Returns:
        Nested dicts of arrays and `DF11Array`s.

    Raises:
        ValueError: not such a file, of another version, or parts of a leaf are missing or do not
            fit each other; the message names the file and the leaf.
    """
    import safetensors
    from safetensors.flax import load_file as load

    with safetensors.safe_open(path, framework="flax") as file:
        metadata = file.metadata() or {}
    if metadata != _METADATA:
        raise ValueError(f"{path}: expected a file with the metadata {_METADATA}, got {metadata}")
    parts: dict[str, dict[str, jax.Array]] = {}
    for name, array in load(path).items():
        leaf, _, part = name.partition(":")
        parts.setdefault(leaf, {})[part] = array
    params: dict[str, Any] = {}
    for name, leaf_parts in parts.items():
        *parents, last = name.split("/")
        place = params
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = leaf_parts[""] if "" in leaf_parts else _join(f"{path}: {name}", leaf_parts)
    return params


def _join(name: str, parts: dict[str, jax.Array]) -> DF11Array:
    if set(parts) != set(_layout.PAYLOAD):
        raise ValueError(
            f"{name}: expected the parts {_layout.PAYLOAD}, got {tuple(sorted(parts))}"
        )
    header = jax.device_get(parts["header"])
    try:
        slice_shape = _layout.unpack_header(header.reshape(-1, header.shape[-1])[0])
    except (IndexError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    array = DF11Array(**parts, slice_shape=slice_shape)
    _layout.check_payload(array.payload, slice_shape, name)
    return array
