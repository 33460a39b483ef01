"""The manifest of a checkpoint, which names its format and describes its leaves and containers.

It is JSON, and part of Orbax's metadata of the item, under the key `df11_jax`; docs/orbax.md
specifies it. Orbax itself does not store that five arrays are one tensor, nor which containers are
tuples, nor which keys are not strings.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._layout import Layout

KEY = "df11_jax"
FORMAT = "df11_jax.orbax"
VERSION = 1

_KEY_DTYPE = "key<"  # the beginning of the names of dtypes of keys for random numbers

# The name of the short arrays of a compressed leaf, which are stored as one array: Orbax takes some
# time and stores some text for each array, however short it is.
TABLES = "tables"

# The place of something in Orbax's tree: the keys that lead there, which are strings to Orbax.
Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array as Orbax stores it.

    Attributes:
        keys: its place in Orbax's tree.
        shape: its shape. Arrays without elements are not stored.
        dtype: its dtype; None if it is a text.
        part: the index of its sharding in the leaf's `shardings`.
    """

    keys: Keys
    shape: tuple[int, ...]
    dtype: str | None
    part: int

    @property
    def nbytes(self) -> int:
        return _nbytes(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """The description of a leaf that is stored.

    Attributes:
        path: its path, as messages write it.
        keys: the place in Orbax's tree of the leaf, or of the dict of its arrays.
        shape: its logical shape.
        dtype: its dtype; bfloat16 if it is compressed, None if it is a text.
        shardings: the shardings of its arrays, as text; None for what was no `jax.Array`.
        layout: the layout of its slices; None if it is not compressed.
        exponent_words: the length of its coded exponents; None if it is not compressed.
        crc32: its checksum; None if none is known.
        has_tables: whether its short arrays are stored as one; plain Orbax does not do that.
    """

    path: str
    keys: Keys
    shape: tuple[int, ...]
    dtype: str | None
    shardings: tuple[str | None, ...]
    layout: Layout | None = None
    exponent_words: int | None = None
    crc32: int | None = None
    has_tables: bool = True

    @property
    def is_compressed(self) -> bool:
        return self.layout is not None

    @property
    def is_key(self) -> bool:
        """Whether it consists of keys for random numbers."""
        return self.dtype is not None and self.dtype.startswith(_KEY_DTYPE)

    @property
    def nbytes(self) -> int:
        """Its size in bytes if it is not compressed; 0 for texts and keys for random numbers."""
        return _nbytes(self.shape, self.dtype)

    @property
    def stored_nbytes(self) -> int:
        """The bytes of the arrays that are stored for it."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """The arrays that are stored for it."""
        if self.layout is None or self.exponent_words is None:
            return (StoredArray(self.keys, self.shape, self.dtype, 0),)
        tables = table_words(self.layout)
        words = (*tables, self.exponent_words, self.layout.view.sign_mantissa_words)
        arrays = list(zip(_layout.PAYLOAD, words, range(len(words)), strict=True))
        if self.has_tables:
            arrays[: len(tables)] = [(TABLES, sum(tables), 0)]
        leading = self.shape[: len(self.shape) - len(self.layout.shape)] + self.layout.parts
        return tuple(
            StoredArray((*self.keys, name), (*leading, n), "uint32", part)
            for name, n, part in arrays
        )

    def __str__(self) -> str:
        shape = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.layout is None:
            return shape
        text = f"{shape}, compressed in slices of {list(self.layout.shape)}"
        if self.layout.parts:
            text += f", divided into {list(self.layout.parts)}"
        return text


def table_words(layout: Layout) -> tuple[int, ...]:
    """The lengths of the short arrays of a slice of a compressed leaf."""
    return (_layout.HEADER_WORDS, _layout.CODEBOOK_WORDS, layout.view.chunks + 1)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The leaves of a checkpoint, and the containers that hold them.

    Attributes:
        containers: the containers as JSON, with numbers in place of the leaves. A container is
            None, or a dict of one entry: `list` or `tuple` with a list of children, or `dict` with
            a list of pairs of keys and children.
        leaves: the leaves, in the order of these numbers.
    """

    containers: Any
    leaves: tuple[StoredLeaf, ...]

    def unflatten(self, values: list[Any]) -> PyTree:
        """The containers, with these values in place of the leaves."""

        def build(node: Any) -> Any:
            if node is None:
                return None
            if isinstance(node, int):
                return values[node]
            ((container, content),) = node.items()
            if container == "dict":
                return {key: build(child) for key, child in content}
            children = [build(child) for child in content]
            return tuple(children) if container == "tuple" else children

        return build(self.containers)

    def orbax_tree(self, value_of: Callable[[StoredArray], Any]) -> PyTree:
        """The containers as Orbax has them, with `value_of(array)` in place of each array."""

        def build(node: Any) -> Any:
            if node is None:
                return None
            if isinstance(node, int):
                leaf = self.leaves[node]
                values = [None if 0 in a.shape else value_of(a) for a in leaf.arrays]
                if leaf.is_compressed:
                    names = [array.keys[-1] for array in leaf.arrays]
                    return dict(zip(names, values, strict=True))
                return values[0]
            ((container, content),) = node.items()
            if container == "dict":
                return {str(key): build(child) for key, child in content}
            return [build(child) for child in content]

        return build(self.containers)

    def to_json(self) -> dict[str, Any]:
        """The entry in Orbax's metadata."""
        shardings: dict[str, int] = {}
        leaves = []
        for leaf in self.leaves:
            entry: dict[str, Any] = {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "shardings": [
                    None if text is None else shardings.setdefault(text, len(shardings))
                    for text in leaf.shardings
                ],
            }
            if leaf.layout is not None:
                entry["layout"] = leaf.layout.to_json()
                entry["exponent_words"] = leaf.exponent_words
            if leaf.crc32 is not None:
                entry["crc32"] = f"{leaf.crc32:08x}"
            leaves.append(entry)
        return {
            "format": FORMAT,
            "version": VERSION,
            "layout_version": _layout.FORMAT_VERSION,
            "leaves": leaves,
            "containers": self.containers,
            "shardings": list(shardings),
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> "Manifest":
        """Reads what `to_json` wrote.

        Args:
            data: the entry.
            where: the checkpoint, for messages.

        Raises:
            ValueError: the manifest is of another format or an unknown version, or is damaged.
        """
        format_name = data.get("format") if isinstance(data, dict) else None
        if format_name != FORMAT:
            raise ValueError(
                f"{where}: its metadata names the format {format_name!r}, expected {FORMAT!r}"
            )
        for field, known in (("version", VERSION), ("layout_version", _layout.FORMAT_VERSION)):
            if data.get(field) != known:
                raise ValueError(
                    f"{where}: has {field} {data.get(field)!r}, this version of df11_jax reads "
                    f"{known}. If it was made by a newer df11_jax, update df11_jax"
                )
        try:
            places = _find_leaves(data["containers"])
            if sorted(places) != list(range(len(data["leaves"]))):
                raise ValueError("leaves and containers do not fit")
            leaves = (
                _parse_leaf(entry, places[i], data["shardings"])
                for i, entry in enumerate(data["leaves"])
            )
            return cls(data["containers"], tuple(leaves))
        except (
            AttributeError,
            IndexError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{where}: the metadata of df11_jax is damaged ({type(error).__name__}: {error})"
            ) from None


def _find_leaves(containers: Any) -> dict[int, Keys]:
    """Where each leaf is."""
    places: dict[int, Keys] = {}

    def find(node: Any, keys: Keys) -> None:
        if isinstance(node, int):
            places[node] = keys
        elif node is not None:
            ((container, content),) = node.items()
            if container not in ("dict", "list", "tuple"):
                raise ValueError(f"unknown container {container!r}")
            for key, child in content if container == "dict" else enumerate(content):
                find(child, (*keys, str(key)))

    find(containers, ())
    return places


def _parse_leaf(entry: dict[str, Any], keys: Keys, shardings: list[str]) -> StoredLeaf:
    leaf = StoredLeaf(
        path=entry["path"],
        keys=keys,
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        shardings=tuple(None if i is None else shardings[i] for i in entry["shardings"]),
        layout=Layout.from_json(entry["layout"]) if "layout" in entry else None,
        exponent_words=entry.get("exponent_words"),
        crc32=int(entry["crc32"], 16) if "crc32" in entry else None,
    )
    if leaf.dtype is not None and not leaf.is_key:
        np.dtype(leaf.dtype)
    sizes = (*leaf.shape, leaf.exponent_words or 0)
    if any(type(n) is not int or n < 0 for n in sizes) or math.prod(n or 1 for n in sizes) >> 59:
        raise ValueError(f"shape {leaf.shape}")
    if (leaf.layout is None) != (leaf.exponent_words is None):
        raise ValueError(f"{leaf.path} has only one of layout and exponent_words")
    if leaf.layout is not None:
        slice_shape = leaf.shape[max(0, len(leaf.shape) - len(leaf.layout.shape)) :]
        if leaf.layout.shape != slice_shape:
            raise ValueError(f"{leaf.path} has the shape {leaf.shape}, and {leaf.layout}")
    if len(leaf.shardings) != (len(_layout.PAYLOAD) if leaf.is_compressed else 1):
        raise ValueError(f"{leaf.path} has {len(leaf.shardings)} shardings")
    return leaf


def _nbytes(shape: tuple[int, ...], dtype: str | None) -> int:
    if dtype is None or dtype.startswith(_KEY_DTYPE):
        return 0
    return math.prod(shape) * np.dtype(dtype).itemsize
