"""An item that Orbax has stored in a directory: its manifest, and reading arrays of it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from df11_jax._files.untrusted_json import parse_json
from df11_jax.orbax import _checked_read, _describe, _leaf_arrays, _manifest, _shardings
from df11_jax.orbax._checked_read import Stored, StoredArrayError
from df11_jax.orbax._folder import METADATA_FILE, check_files, check_path
from df11_jax.orbax._manifest import Keys, Manifest, StoredArray, StoredLeaf

ON_HOST = ocp.RestoreArgs(restore_type=np.ndarray)

# df11_jax has arrays stored uncompressed, so that larger ones than all files together cannot be
# there. OCDBT compresses very short chunks, of which a smaller array may consist.
_MAY_BE_COMPRESSED_BYTES = 1 << 26


class StoredItem:
    """A checkpoint of an item.

    Attributes:
        name: the name of the checkpoint, for messages.
        has_manifest: whether df11_jax saved it, rather than Orbax alone.
        manifest: the manifest that is stored, or one that was inferred from Orbax's metadata.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        """Reads the metadata.

        Args:
            directory: the directory of the item.

        Raises:
            FileNotFoundError: no pytree was saved there.
            ValueError: the checkpoint is of another format or an unknown version, or is damaged.
        """
        self.name = str(directory)
        self._handler = _checked_read.handler(self._check_arrays)
        self._directory = epath.Path(directory)
        self._file_bytes = check_files(self._directory)
        self._expected: dict[str, tuple[StoredLeaf, StoredArray]] = {}
        entry = self._entry()
        self.has_manifest = entry is not None
        if self.has_manifest:
            self.manifest = Manifest.from_json(entry, self.name)
            self._expected = {
                ".".join(array.keys): (leaf, array)
                for leaf in self.manifest.leaves
                for array in leaf.arrays
            }
            return
        tree = self._orbax_metadata().tree
        headers = dict.fromkeys(_describe.find_headers(tree), ON_HOST)

        def with_values(value_of: Callable[[Keys], Any]) -> PyTree:
            return jax.tree.map_with_path(
                lambda path, _: value_of(_describe.stored_keys(path)), tree
            )

        self.manifest = _describe.infer(tree, self._read(with_values, headers), self.name)

    def abstract(self) -> PyTree:
        """The pytree that was saved, with `jax.ShapeDtypeStruct`s in place of the arrays.

        Raises:
            ValueError: a leaf has keys for random numbers of an implementation that is unknown.
        """
        leaves = []
        for leaf in self.manifest.leaves:
            try:
                leaves.append(_abstract(leaf))
            except ValueError as error:
                raise ValueError(f"{self.name}: {leaf.path}: {error}") from None
        return self.manifest.unflatten(leaves)

    def read(self, wanted: Mapping[Keys, ocp.RestoreArgs]) -> dict[Keys, Any]:
        """Reads arrays.

        Args:
            wanted: Orbax's arguments for restoring each of them.

        Raises:
            MemoryError: the arrays are larger than this machine's memory.
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
        file = self._directory / METADATA_FILE
        if not file.exists():
            return self._orbax_metadata().custom_metadata  # or its error, which says what is there
        try:
            metadata = parse_json(file.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {METADATA_FILE} is damaged ({error}). Restore another copy of it"
            ) from None
        custom = metadata.get("custom_metadata") if isinstance(metadata, dict) else None
        return custom.get(_manifest.KEY) if isinstance(custom, dict) else None

    def _check_arrays(self, arrays: Sequence[Stored]) -> None:
        """Checks what is to be read at once, before it is."""
        for stored in arrays:
            if stored.name not in self._expected:
                continue  # Orbax alone saved it; its metadata is all that is known
            leaf, array = self._expected[stored.name]
            place = f"{self.name}: {leaf.path}"
            if leaf.is_compressed:
                place += f": {array.keys[-1]}"
            expected = stored if array.in_zarr is None else stored._replace(**array.in_zarr)
            if stored != expected:
                raise StoredArrayError(f"{place}: {stored} is stored, expected {expected}")
            limit = max(self._file_bytes or 0, _MAY_BE_COMPRESSED_BYTES)
            if self._file_bytes is not None and stored.nbytes > limit:
                raise StoredArrayError(
                    f"{place}: its chunks of {stored} have {stored.nbytes} bytes, but all files of "
                    f"the checkpoint together {self._file_bytes}: it is damaged"
                )
        if not _checked_read.can_allocate(sum(stored.memory for stored in arrays)):
            largest = max(arrays, key=lambda stored: stored.memory)
            raise MemoryError(
                f"{self.name}: {largest.name}: {largest} is stored, and to read it takes "
                f"{largest.memory} bytes of memory, more than there are. Either the checkpoint is "
                "damaged, or it needs a machine with more memory"
            )

    def _orbax_metadata(self) -> Any:
        with self._orbax_errors():
            return self._handler.metadata(self._directory)

    @contextlib.contextmanager
    def _orbax_errors(self) -> Iterator[None]:
        """Adds the checkpoint's name to the errors, of any type, that Orbax raises for damage."""
        check_path(self._directory)
        try:
            yield
        except StoredArrayError:
            raise
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
    arrays = [
        jax.ShapeDtypeStruct(
            array.shape,
            _manifest.dtype_of(str(array.dtype)),
            sharding=None if text is None else _shardings.from_text(text, array.shape),
        )
        for array, text in zip(leaf.parts, leaf.shardings, strict=True)
    ]
    return _leaf_arrays.join(arrays, leaf) if leaf.is_compressed else arrays[0]
