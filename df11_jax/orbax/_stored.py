"""An item that Orbax has stored in a directory: its manifest, and reading arrays of it."""

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
from df11_jax.orbax._manifest import Keys, Manifest, StoredLeaf

ON_HOST = ocp.RestoreArgs(restore_type=np.ndarray)

# Orbax's metadata of a pytree.
_METADATA_FILE = "_METADATA"


class StoredItem:
    """A checkpoint of an item.

    Attributes:
        name: the name of the checkpoint, for messages.
        has_manifest: whether df11_jax saved it, rather than Orbax alone.
        manifest: the manifest that is stored, or one that was inferred from Orbax's metadata.
    """

    def __init__(self, handler: ocp.PyTreeCheckpointHandler, directory: epath.PathLike) -> None:
        """Reads the metadata.

        Args:
            handler: Orbax's handler, which reads.
            directory: the directory of the item.

        Raises:
            FileNotFoundError: no pytree was saved there.
            ValueError: the checkpoint is of another format or an unknown version, or is damaged.
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
        """The pytree that was saved, with `jax.ShapeDtypeStruct`s in place of the arrays."""
        return self.manifest.unflatten([_abstract(leaf) for leaf in self.manifest.leaves])

    def read(self, wanted: Mapping[Keys, ocp.RestoreArgs]) -> dict[Keys, Any]:
        """Reads arrays.

        Args:
            wanted: Orbax's arguments for restoring each of them.

        Raises:
            ValueError: the arrays that are stored are not those of the manifest.
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
        # Orbax opens all arrays to get at its metadata, which takes as long as reading small ones.
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
        """Adds the checkpoint's name to the errors, of any type, that Orbax raises for damage."""
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
            if isinstance(error, jax.errors.JaxRuntimeError):  # for example, too little memory
                raise
            # Names in damaged metadata may have characters that cannot be printed.
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
            with_values: a function that makes a tree like the stored one, given a function from
                the keys of an array to the value in its place.
            wanted: Orbax's arguments for restoring each of them.
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


def _abstract(leaf: StoredLeaf) -> Any:
    if leaf.dtype is None:
        return ""
    leaf = dataclasses.replace(leaf, has_tables=False)  # as in memory
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
    # numpy has no dtypes for keys for random numbers.
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.eval_shape(functools.partial(jax.random.key, 0, impl=implementation))
        if str(key.dtype) == name:
            return key.dtype
    return np.dtype(name)
