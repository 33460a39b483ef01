"""What Orbax has stored in a directory, and reading parts of it."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from df11_jax.orbax import _describe, _leaf_arrays, _manifest, _shardings
from df11_jax.orbax._manifest import Keys, Leaf, Manifest

ON_HOST = ocp.RestoreArgs(restore_type=np.ndarray)

# Orbax's metadata of a pytree.
_METADATA_FILE = "_METADATA"


class Stored:
    """A checkpoint of an item.

    Attributes:
        name: of the checkpoint, for messages.
        has_manifest: whether df11_jax saved it, rather than Orbax alone.
        manifest: its own, or one that was made from what is stored.
    """

    def __init__(self, handler: ocp.PyTreeCheckpointHandler, directory: epath.PathLike) -> None:
        """Reads the metadata.

        Args:
            handler: to read with.
            directory: of the item.

        Raises:
            FileNotFoundError: no pytree was saved there.
            ValueError: of another format or an unknown version, or damaged.
        """
        self.name = str(directory)
        self._handler = handler
        self._directory = epath.Path(directory)
        entry = self._entry()
        self.has_manifest = entry is not None
        if self.has_manifest:
            self.manifest = Manifest.from_json(entry, self.name)
            return
        tree = self._orbax_metadata().tree
        headers = dict.fromkeys(_describe.find_headers(tree), ON_HOST)

        def with_values(value_of: Callable[[Keys], Any]) -> PyTree:
            return jax.tree.map_with_path(
                lambda path, _: value_of(_describe.stored_keys(path)), tree
            )

        self.manifest = _describe.infer(tree, self._read(with_values, headers), self.name)

    def abstract(self) -> PyTree:
        """The pytree that was saved, with `jax.ShapeDtypeStruct`s in the places of the arrays."""
        return self.manifest.unflatten([_abstract(leaf) for leaf in self.manifest.leaves])

    def read(self, wanted: Mapping[Keys, ocp.RestoreArgs]) -> dict[Keys, Any]:
        """Reads arrays.

        Args:
            wanted: how to restore each of them.

        Raises:
            ValueError: what is stored is not what the manifest says.
        """
        try:
            return self._read(
                lambda value_of: self.manifest.orbax_tree(lambda array: value_of(array.keys)),
                wanted,
            )
        except Exception:
            self._check_names()
            raise

    def _entry(self) -> Any:
        """The manifest as JSON; None if there is none."""
        # Orbax's way to its metadata opens all arrays, which takes as long as reading small ones.
        try:
            metadata = json.loads((self._directory / _METADATA_FILE).read_text())["custom_metadata"]
        except (KeyError, OSError, RecursionError, TypeError, ValueError):
            metadata = self._orbax_metadata().custom_metadata
        return metadata.get(_manifest.KEY) if isinstance(metadata, dict) else None

    def _orbax_metadata(self) -> Any:
        with self._orbax_errors():
            return self._handler.metadata(self._directory)

    @contextlib.contextmanager
    def _orbax_errors(self) -> Iterator[None]:
        """Names the checkpoint in what Orbax raises for damaged ones, which can be anything."""
        try:
            yield
        except (
            AssertionError,
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, jax.errors.JaxRuntimeError):  # such as too little memory
                raise
            # Names in damaged metadata may have what cannot be printed.
            said = f"{type(error).__name__}: {error!s:.1000}".encode(errors="backslashreplace")
            raise ValueError(
                f"{self.name}: Orbax cannot read it, it is damaged or no checkpoint of arrays "
                f"({said.decode()})"
            ) from error

    def _read(
        self,
        with_values: Callable[[Callable[[Keys], Any]], PyTree],
        wanted: Mapping[Keys, ocp.RestoreArgs],
    ) -> dict[Keys, Any]:
        """Reads arrays.

        Args:
            with_values: makes a tree like the stored one of values for each array.
            wanted: how to restore each of them.
        """
        if not wanted:
            return {}
        request = ocp.args.PyTreeRestore(
            item=with_values(lambda keys: 0 if keys in wanted else ocp.PLACEHOLDER),
            restore_args=with_values(lambda keys: wanted.get(keys, ocp.RestoreArgs())),
        )
        with self._orbax_errors():
            restored = self._handler.restore(self._directory, args=request)
        values = {
            _describe.stored_keys(path): value
            for path, value in jax.tree.leaves_with_path(restored)
        }
        return {keys: values[keys] for keys in wanted}

    def _check_names(self) -> None:
        """Checks that the arrays that the manifest names are stored, and no others."""
        stored = {
            _describe.stored_keys(path)
            for path, _ in jax.tree.leaves_with_path(self._orbax_metadata().tree)
        }
        for leaf in self.manifest.leaves:
            arrays = [array for array in leaf.arrays if 0 not in array.shape]
            missing = [array.keys[-1] for array in arrays if array.keys not in stored]
            if missing:
                lacks = f"its {', '.join(missing)}" if leaf.is_compressed else "this leaf"
                raise ValueError(f"{self.name}: {leaf.path}: the checkpoint lacks {lacks}")
            stored -= {array.keys for array in arrays}
        if stored:
            extra = sorted("/".join(keys) for keys in stored)
            raise ValueError(f"{self.name}: has arrays that its metadata does not name: {extra}")


def open_stored(directory: epath.PathLike) -> Stored:
    """The checkpoint of an item, to be read by this process alone."""
    return Stored(ocp.PyTreeCheckpointHandler(), directory)


def _abstract(leaf: Leaf) -> Any:
    if leaf.dtype is None:
        return ""
    leaf = dataclasses.replace(leaf, has_tables=False)  # the arrays that it has in memory
    arrays = [
        jax.ShapeDtypeStruct(
            array.shape,
            _dtype(str(array.dtype)),
            sharding=None if text is None else _shardings.from_text(text),
        )
        for array, text in zip(leaf.arrays, leaf.shardings, strict=True)
    ]
    return _leaf_arrays.join(arrays, leaf) if leaf.is_compressed else arrays[0]


def _dtype(name: str) -> Any:
    # numpy does not have keys for random numbers.
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.eval_shape(functools.partial(jax.random.key, 0, impl=implementation))
        if str(key.dtype) == name:
            return key.dtype
    return np.dtype(name)
