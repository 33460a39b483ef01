"""Makes the manifests of parameters to be saved, and of checkpoints that have none."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name
from df11_jax.orbax import _shardings
from df11_jax.orbax._manifest import MAX_DEPTH, TABLES, Keys, Manifest, StoredLeaf


def describe(params: PyTree) -> tuple[Manifest, list[Any]]:
    """Makes the manifest of parameters, without checksums, and lists their leaves in its order.

    Args:
        params: any pytree. Dicts, lists and tuples are recorded as such; other containers are
            recorded as Orbax does it: as dicts, or as lists if their children have no names.

    Raises:
        TypeError: a leaf is neither an array nor a number nor a text, or of a type that Orbax
            does not save.
        ValueError: two leaves would be stored in one place, or one is in too many containers.
    """
    values: list[Any] = []

    def describe_leaf(value: Any, path: str, keys: Keys) -> StoredLeaf:
        values.append(value)
        if len(keys) > MAX_DEPTH:
            raise ValueError(f"{path}: is in more than {MAX_DEPTH} containers")
        arrays = value.payload if is_df11(value) else (value,)
        shardings = tuple(
            _shardings.to_text(array.sharding) if isinstance(array, jax.Array) else None
            for array in arrays
        )
        if isinstance(value, DF11Array):
            return StoredLeaf(
                path,
                keys,
                value.shape,
                str(value.dtype),
                shardings,
                value.layout,
                value.exponents.shape[-1],
            )
        if isinstance(value, str):
            return StoredLeaf(path, keys, (), None, shardings)
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        if getattr(dtype, "kind", "") in ("O", "S", "U", "M", "m") or getattr(
            dtype, "fields", None
        ):
            raise TypeError(f"{path}: Orbax cannot save a {type(value).__name__} of {dtype}")
        if not ocp.type_handlers.has_type_handler(type(value)):
            kind = type(value).__name__
            if type(value).__module__ == "numpy":  # whose bool is not Python's, which can be saved
                kind = f"numpy.{kind}"
            raise TypeError(f"{path}: Orbax cannot save a {kind}; save numpy.asarray of it")
        if not getattr(dtype, "isnative", True):
            raise TypeError(
                f"{path}: Orbax would not give back the byte order of {dtype}; save "
                "array.astype(array.dtype.newbyteorder('='))"
            )
        return StoredLeaf(path, keys, tuple(np.shape(value)), str(dtype), shardings)

    manifest = _walk(params, is_df11, describe_leaf)
    _check_names(manifest)
    return manifest, values


def infer(stored: PyTree, headers: Mapping[Keys, np.ndarray], where: str) -> Manifest:
    """Makes the manifest of a checkpoint that has none because plain Orbax saved it.

    Args:
        stored: Orbax's metadata of all that is stored.
        headers: the headers of compressed leaves, by the keys that `find_headers` gives.
        where: the checkpoint, for messages.

    Raises:
        ValueError: a header is invalid, or the arrays of a compressed leaf do not fit it.
    """

    def describe_leaf(node: Any, path: str, keys: Keys) -> StoredLeaf:
        if _is_damaged_df11(node):
            raise ValueError(
                f"{where}: {path}: is a compressed leaf, of which the metadata of df11_jax is "
                "missing: it is damaged. Restore another copy of it"
            )
        if not isinstance(node, dict):
            dtype = getattr(node, "dtype", None)
            shape = tuple(getattr(node, "shape", ()))
            return StoredLeaf(path, keys, shape, dtype and str(dtype), (_sharding(node),))
        rows = headers[*keys, "header"]
        arrays = [node[part] for part in _layout.PAYLOAD]
        try:
            layout = _layout.unpack_header(rows.reshape(-1, rows.shape[-1])[0])
        except (IndexError, ValueError) as error:
            raise ValueError(f"{where}: {path}: {error}") from None
        stack = _layout.check_payload(arrays, layout, f"{where}: {path}")
        shardings = tuple(_sharding(array) for array in arrays)
        words = node["exponents"].shape[-1]
        return StoredLeaf(
            path,
            keys,
            stack + layout.shape,
            "bfloat16",
            shardings,
            layout,
            words,
            has_tables=False,
        )

    return _walk(
        stored, lambda node: _is_stored_df11(node) or _is_damaged_df11(node), describe_leaf
    )


def find_headers(stored: PyTree) -> list[Keys]:
    """Finds the places at which plain Orbax has stored headers of compressed leaves.

    Args:
        stored: Orbax's metadata of all that is stored.
    """
    nodes = jax.tree.leaves_with_path(stored, is_leaf=_is_stored_df11)
    return [(*stored_keys(path), "header") for path, node in nodes if _is_stored_df11(node)]


def stored_keys(path: tuple[Any, ...]) -> Keys:
    """The place in Orbax's tree of what is at this path of a pytree."""
    return tuple(str(_name(key)) for key in path)


def _walk(
    tree: PyTree,
    is_leaf: Callable[[Any], bool],
    describe_leaf: Callable[[Any, str, Keys], StoredLeaf],
) -> Manifest:
    leaves: list[StoredLeaf] = []

    def visit(node: Any, path: tuple[Any, ...]) -> Any:
        children = jax.tree.leaves_with_path(node, is_leaf=lambda child: child is not node)
        if is_leaf(node) or (len(children) == 1 and children[0][1] is node):
            leaves.append(describe_leaf(node, path_name(path), stored_keys(path)))
            return len(leaves) - 1
        if node is None:
            return None
        named = [(_name(key), visit(child, (*path, key))) for (key,), child in children]
        if isinstance(node, (list, tuple)) and not hasattr(node, "_fields"):
            return {"list" if isinstance(node, list) else "tuple": [child for _, child in named]}
        if any(isinstance(key, jax.tree_util.FlattenedIndexKey) for (key,), _ in children):
            return {"list": [child for _, child in named]}
        return {"dict": [list(pair) for pair in named]}

    return Manifest(visit(tree, ()), tuple(leaves))


def _name(key: Any) -> str | int:
    """The key under which a container has a child, as a string unless it is an integer."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            name = getattr(key, attribute)
            return name if type(name) in (str, int) else str(name)
    return str(key)


def _is_stored_df11(node: Any) -> bool:
    """Whether a node of Orbax's metadata is the dict of arrays of a compressed leaf."""
    return (
        isinstance(node, dict)
        and node.keys() == set(_layout.PAYLOAD)
        and all(getattr(array, "dtype", None) == np.uint32 for array in node.values())
    )


def _is_damaged_df11(node: Any) -> bool:
    """Whether a node is a compressed leaf that only the manifest, which is missing, describes."""
    return isinstance(node, dict) and node.keys() == {TABLES, *_layout.PAYLOAD[-2:]}


def _sharding(array: Any) -> str | None:
    sharding = getattr(array, "sharding", None)
    return None if sharding is None else sharding.to_serialized_string()


def _check_names(manifest: Manifest) -> None:
    # Orbax joins keys with dots, and would overwrite the first of two arrays with the same name.
    paths: dict[str, str] = {}
    for leaf in manifest.leaves:
        for array in leaf.arrays:
            name = ".".join(array.keys)
            if name in paths:
                raise ValueError(
                    f"{leaf.path}: Orbax stores it as {name!r}, like {paths[name]}; rename one"
                )
            paths[name] = leaf.path
