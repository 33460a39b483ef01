"""Native checkpoints: safetensors files that hold pytrees with compressed leaves.

A compressed leaf at path `a/b` is five tensors, `a/b:header` to `a/b:sign_mantissa`; its header
holds its shape, so a file describes itself. Every other leaf is one tensor, named by its path. The
metadata of a file that was made of another one keeps the other's under keys of its own.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from df11_jax import _host_codec, _layout
from df11_jax._array import DF11Array
from df11_jax._brief import brief
from df11_jax._files.folder import Folder
from df11_jax._files.folder_source import FolderSource
from df11_jax._files.safetensors import DTYPES, Tensor, TensorFile, check_shape
from df11_jax._files.source import Arrangement, TensorInfo
from df11_jax._host_arrays import default_device, empty_aligned
from df11_jax._host_codec import Payload
from df11_jax._layout import Layout
from df11_jax.checkpoints import _native_checksums
from df11_jax.checkpoints._shard_files import StoredLeaf
from df11_jax.checkpoints._tree import Structure

METADATA = {"format": "df11_jax", "version": str(_layout.FORMAT_VERSION)}
# In the metadata of one file: what the names of leaves do not tell about the tree.
STRUCTURE = "structure"
# In the metadata of a file, before the keys of those of the file that it was made of; and in that
# of an index, the key of the metadata of the index that it was made of.
SOURCE_PREFIX = "source:"
SOURCE = "source"


def part_names(name: str) -> tuple[str, ...]:
    """The names of the five tensors of a compressed leaf."""
    return tuple(f"{name}:{part}" for part in _layout.PAYLOAD)


def is_native(files: Iterable[TensorFile]) -> bool:
    """Whether files are a native checkpoint, of any version: they say so, or look like one.

    Files that look like one and do not say so are damaged, and must not pass as plain ones.
    """
    return any(
        file.metadata.get("format") == METADATA["format"]
        or _native_checksums.has_checksums(file)
        or any(name.endswith(f":{_layout.PAYLOAD[-1]}") for name in file.entries)
        for file in files
    )


class NativeCheckpoint(FolderSource):
    """Leaves from one or several files.

    Attributes:
        path: the path of the directory or file.
        tensors: all leaves by path, as they are without compression.
        structure: what the paths do not tell about the tree that was saved.
    """

    format = "native"

    def __init__(self, folder: Folder, files: Mapping[str, TensorFile]) -> None:
        """Takes the files that hold the tensors, and checks the leaves that the headers describe.

        Raises:
            ValueError: a file is not native or of another version; parts of a leaf are missing or
                do not fit each other; a header is corrupt. The message names the file and the leaf.
        """
        super().__init__(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.structure = Structure()
        self._files = files
        self._layouts: dict[str, Layout] = {}
        self._checksums: dict[Path, dict[str, str]] = {}
        for file in dict.fromkeys(files.values()):
            metadata, self._checksums[file.path] = _native_checksums.split_metadata(file)
            metadata = {k: v for k, v in metadata.items() if not k.startswith(SOURCE_PREFIX)}
            if STRUCTURE in metadata:
                self.structure = Structure.from_json(metadata.pop(STRUCTURE), str(file.path))
            version = metadata.get("version")
            if metadata.get("format") == METADATA["format"] and version != METADATA["version"]:
                raise ValueError(
                    f"{file.path}: is of version {brief(version)} of the native format, expected "
                    f"{METADATA['version']!r}. Install the version of df11_jax that wrote it"
                )
            if metadata != METADATA:
                raise ValueError(
                    f"{file.path}: expected a file with the metadata {METADATA}, "
                    f"got {brief(metadata)}"
                )
            if not file.entries.keys() <= files.keys():
                name = min(file.entries.keys() - files.keys())
                raise ValueError(f"{self.path}: the index does not list {name} of {file.path.name}")
        leaves: dict[str, list[str]] = {}
        for name in files:
            leaf, _, part = name.partition(":")
            leaves.setdefault(leaf, []).append(part)
        for leaf, parts in leaves.items():
            self.tensors[leaf] = (
                self._plain_info(leaf) if parts == [""] else self._info(leaf, parts)
            )

    def read(self, name: str) -> np.ndarray:
        """One leaf, decoded, on the host."""
        if name not in self._layouts:
            return self._array(name)
        return _host_codec.decode(self._payload(name), self._layouts[name], self._where(name))

    def load(self, name: str, *, verify: bool = True) -> DF11Array | Array | np.ndarray:
        """One leaf as it is stored, on the default device.

        Args:
            name: the path of the leaf.
            verify: whether to check the chunks of a compressed leaf, too.

        Raises:
            ValueError: the leaf is corrupt.
        """
        if name not in self._layouts:
            return to_device(self._array(name))
        layout, payload = self._layouts[name], self._payload(name, verify=verify)
        if verify:
            _host_codec.verify(payload, layout, self._where(name))
        arrays = [jnp.asarray(to_device(array)) for array in payload]
        return DF11Array.from_payload(arrays, layout)

    def layout(self, name: str) -> Layout | None:
        """The layout of the slices of a leaf; None if it is stored plain."""
        return self._layouts.get(name)

    def view(self, name: str) -> DF11Array | np.ndarray:
        """One leaf as it is stored, in arrays of the mapped files."""
        if name not in self._layouts:
            return self._array(name)
        return DF11Array.from_payload(self._payload(name, verify=False), self._layouts[name])

    def load_shards(
        self, name: str, where: NamedSharding, *, verify: bool = True
    ) -> DF11Array | Array:
        """One leaf as it is stored, of which each device gets its shard.

        Args:
            name: the path of the leaf.
            where: its sharding, along axes of the stack if it is compressed.
            verify: whether to check the chunks of a compressed leaf, too: those that this process
                reads, so that it does not touch the others. That they are those that were saved,
                only their digest tells, which is checked if all devices are of this process.

        Raises:
            ValueError: the leaf is corrupt.
        """
        layout = self._layouts.get(name)
        if layout is None:
            parts = [self._array(name)]
        else:
            parts = self._payload(name, verify=verify and where.is_fully_addressable)
        shards = []
        for device, index in where.addressable_devices_indices_map(parts[0].shape).items():
            assert index is not None, "these are its devices"
            at = index if layout is None else index[:-1]  # arrays have words of different numbers
            # Copies: on a CPU, jax might take the mapped file for the array's memory.
            shard = [np.array(part[at]) for part in parts]
            if layout is not None and verify:
                _host_codec.verify(shard, layout, f"{self._where(name)}: the shard of {device}")
            shards.append([jax.device_put(part, device) for part in shard])
        arrays = [
            jax.make_array_from_single_device_arrays(part.shape, where, list(pieces))
            for part, pieces in zip(parts, zip(*shards, strict=True), strict=True)
        ]
        return arrays[0] if layout is None else DF11Array.from_payload(arrays, layout)

    def arrangement(self) -> Arrangement:
        """The files of the tensors, with the strings that they had before compression."""
        files = {
            name: self._files[part_names(name)[0] if name in self._layouts else name]
            for name in self.tensors
        }
        return self._arrange(files, _source_metadata, _source_index_metadata)

    def _payload(self, name: str, *, verify: bool = True) -> list[np.ndarray]:
        payload = [self._array(part) for part in part_names(name)]
        if verify:
            covered = f"{name}:{_native_checksums.DIGEST}"
            expected = self._checksums[self._files[covered].path].get(covered)
            _native_checksums.check_digest(
                payload, self._layouts[name], expected, self._where(name)
            )
        return payload

    def _array(self, name: str) -> np.ndarray:
        file = self._files[name]
        array = file.array(name)
        _native_checksums.check(file, name, array, self._checksums[file.path])
        return array

    def _plain_info(self, name: str) -> TensorInfo:
        entry = self._files[name].entries[name]
        return TensorInfo(entry.shape, entry.dtype, entry.nbytes, entry.nbytes)

    def _info(self, name: str, parts: Sequence[str]) -> TensorInfo:
        if sorted(parts) != sorted(_layout.PAYLOAD):
            stored = f"{name}:{parts[0]}" if parts[0] else name
            raise ValueError(
                f"{self._files[stored].path}: {name}: expected the parts {_layout.PAYLOAD}, got "
                f"{tuple(sorted(parts))}"
            )
        where = self._where(name)
        headers = self._array(part_names(name)[0])
        if not headers.size or headers.shape[-1:] != (_layout.HEADER_WORDS,):
            raise ValueError(
                f"{where}: header is {headers.dtype}{list(headers.shape)}, expected "
                f"uint32[..., {_layout.HEADER_WORDS}] of one slice or more"
            )
        try:
            layout = _layout.unpack_header(headers.reshape(-1, _layout.HEADER_WORDS)[0])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        entries = [self._files[part].entries[part] for part in part_names(name)]
        # Shapes stand for the arrays, which would be read from the disk.
        payload = [jax.ShapeDtypeStruct(e.shape, DTYPES.get(e.dtype, object)) for e in entries]
        self._layouts[name] = layout
        shape = _layout.check_payload(payload, layout, where) + layout.shape
        check_shape(shape, where)
        stored_nbytes = sum(entry.nbytes for entry in entries)
        return TensorInfo(shape, "BF16", 2 * math.prod(shape), stored_nbytes)

    def _where(self, name: str) -> str:
        return f"{self._files[part_names(name)[0]].path}: {name}"


def compressed_leaf(name: str, payload: Payload, layout: Layout) -> StoredLeaf:
    """A compressed leaf, as it is to be written.

    Args:
        name: the path of the leaf.
        payload: its five arrays.
        layout: its layout.
    """
    checksums = {
        f"{name}:{_native_checksums.DIGEST}": _native_checksums.digest(payload, layout, name)
    }
    return StoredLeaf(map(Tensor.of, part_names(name), payload), checksums)


def _source_metadata(file: TensorFile) -> dict[str, str]:
    return {
        key.removeprefix(SOURCE_PREFIX): value
        for key, value in file.metadata.items()
        if key.startswith(SOURCE_PREFIX)
    }


def _source_index_metadata(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    entries = metadata.get(SOURCE)
    return entries if isinstance(entries, dict) else {}


def to_device(array: np.ndarray) -> Array | np.ndarray:
    """A view of a mapped file as an array on the default device.

    If jax lacks its type, as it lacks 64-bit integers by default, the array is on the host.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array.copy()
    if default_device().platform == "cpu":
        # `device_put` would use the file as the array's memory if that happens to be aligned, even
        # with `may_alias=False`.
        copied = empty_aligned(array.shape, array.dtype)
        copied[...] = array
        array = copied
    # Not `jax.numpy.array`, which is a transfer that users may forbid (`jax.transfer_guard`), and
    # with a mesh that is set makes a copy for each of its devices.
    return jax.device_put(array)
