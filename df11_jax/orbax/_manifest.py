"""The manifest of a checkpoint, which names its format and describes its leaves and containers.

It is JSON, and part of Orbax's metadata of the item, under the key `df11_jax`; docs/orbax.md
specifies it. Orbax itself does not store that five arrays are one tensor, nor which containers are
tuples, nor which keys are not strings.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._brief import brief
from df11_jax._layout import Layout

KEY = "df11_jax"
FORMAT = "df11_jax.orbax"
VERSION = 1

_KEY_DTYPE = "key<"  # the beginning of the names of dtypes of keys for random numbers

MAX_DEPTH = 256  # of containers in each other; Orbax saves about 300 before Python's stack ends
_MAX_DIMS = 64 - 1 - _layout.MAX_DIMS  # numpy's limit, and the axes that coded arrays have more
_MAX_ELEMENTS = 1 << 59  # of which the bytes have 64 bits

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

    @property
    def in_zarr(self) -> dict[str, Any] | None:
        """The shape and dtype that zarr has for it; None for texts and what is unknown here."""
        if self.dtype is None:
            return None
        if not self.dtype.startswith(_KEY_DTYPE):
            return {"shape": self.shape, "dtype": str(np.dtype(self.dtype).newbyteorder("="))}
        try:
            key = jax.ShapeDtypeStruct(self.shape, dtype_of(self.dtype))
        except ValueError:
            return None
        data = jax.eval_shape(jax.random.key_data, key)
        return {"shape": data.shape, "dtype": str(data.dtype)}


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

    @functools.cached_property
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

    @functools.cached_property
    def parts(self) -> tuple[StoredArray, ...]:
        """The arrays of which it consists in memory, each with its sharding in `shardings`."""
        return dataclasses.replace(self, has_tables=False).arrays

    def __str__(self) -> str:
        if self.dtype is None:
            return "a text"
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
                f"{where}: its metadata names the format {brief(format_name)}, expected {FORMAT!r}"
            )
        for field, known in (("version", VERSION), ("layout_version", _layout.FORMAT_VERSION)):
            if data.get(field) != known:
                raise ValueError(
                    f"{where}: has {field} {brief(data.get(field))}, this version of df11_jax "
                    f"reads {known}. If it was made by a newer df11_jax, update df11_jax"
                )
        try:
            entries = _field(data, "leaves", _is_list_of(dict))
            shardings = _field(data, "shardings", _is_list_of(str))
            places = _find_leaves(data.get("containers"))
            if sorted(places) != list(range(len(entries))):
                raise ValueError(f"containers has the leaves {sorted(places)!s:.100}")
            leaves = [_parse_leaf(entry, places[i], shardings) for i, entry in enumerate(entries)]
            names = [".".join(array.keys) for leaf in leaves for array in leaf.arrays]
            if len(set(names)) != len(names):
                raise ValueError("containers has two arrays of the same name")
        except ValueError as error:
            raise ValueError(
                f"{where}: the metadata of df11_jax is damaged ({error}). Restore another copy of "
                "the checkpoint"
            ) from None
        return cls(data["containers"], tuple(leaves))


@functools.lru_cache
def dtype_of(name: str) -> Any:
    """The dtype with a name, which may be one of keys for random numbers.

    Raises:
        ValueError: there is no such dtype.
    """
    if name.startswith(_KEY_DTYPE):
        for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
            key = jax.eval_shape(functools.partial(jax.random.key, 0, impl=implementation))
            if str(key.dtype) == name:
                return key.dtype
        raise ValueError(f"the dtype {brief(name)} is unknown")
    return np.dtype(name)


def _field(entry: dict[str, Any], name: str, is_sound: Callable[[Any], bool]) -> Any:
    """A field of an object.

    Raises:
        ValueError: it is missing, or not sound.
    """
    if not is_sound(entry.get(name)):
        raise ValueError(f"{name} is {brief(entry.get(name))}")
    return entry.get(name)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(type(item) is kind for item in value)


def _is_shape(value: Any) -> bool:
    if not _is_list_of(int)(value) or len(value) > _MAX_DIMS:
        return False
    return all(n >= 0 for n in value) and math.prod(n or 1 for n in value) < _MAX_ELEMENTS


def _is_dtype(value: Any) -> bool:
    if value is None:
        return True  # a text
    if type(value) is not str:
        return False
    if value.startswith(_KEY_DTYPE):
        return True  # perhaps of an implementation of the user's
    try:
        dtype = np.dtype(value)
    except (SyntaxError, TypeError, ValueError):
        return False
    return str(dtype) == value and dtype.kind in "biufcV" and dtype.type is not np.void


def _find_leaves(containers: Any) -> dict[int, Keys]:
    """Where each leaf is."""
    places: dict[int, Keys] = {}

    def find(node: Any, keys: Keys) -> None:
        if type(node) is int:
            places[node] = keys
            return
        if node is None:
            return
        if type(node) is not dict or len(node) != 1 or len(keys) > MAX_DEPTH:
            raise ValueError(f"containers has {brief(node)} at the depth {len(keys)}")
        ((container, content),) = node.items()
        if container not in ("dict", "list", "tuple") or type(content) is not list:
            raise ValueError(f"containers has {brief(node)}")
        if container != "dict":
            content = [[i, child] for i, child in enumerate(content)]
        for pair in content:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int):
                raise ValueError(f"containers has {brief(pair)} in a dict")
            find(pair[1], (*keys, str(pair[0])))

    find(containers, ())
    return places


def _parse_leaf(entry: dict[str, Any], keys: Keys, shardings: list[str]) -> StoredLeaf:
    path = _field(entry, "path", lambda value: type(value) is str)
    try:
        return _parse_fields(entry, path, keys, shardings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_fields(entry: dict[str, Any], path: str, keys: Keys, shardings: list[str]) -> StoredLeaf:
    shape = tuple(_field(entry, "shape", _is_shape))
    dtype = _field(entry, "dtype", _is_dtype)
    if dtype is None and shape:
        raise ValueError(f"shape is {list(shape)}, and dtype says that it is a text")
    layout = words = crc32 = None
    if "layout" in entry or "exponent_words" in entry:
        try:
            layout = Layout.from_json(entry["layout"])
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"layout: {type(error).__name__}: {error}") from None
        words = _field(entry, "exponent_words", lambda value: _is_shape([*shape, value]))
        if dtype != "bfloat16":
            raise ValueError(f"dtype is {brief(dtype)}, and it has a layout")
        if layout.shape != shape[max(0, len(shape) - len(layout.shape)) :]:
            raise ValueError(f"shape is {list(shape)}, and layout {layout}")
    if "crc32" in entry:
        is_crc32 = re.compile("[0-9a-f]{8}").fullmatch
        crc32 = int(_field(entry, "crc32", lambda v: type(v) is str and bool(is_crc32(v))), 16)

    def are_shardings(value: Any) -> bool:
        count = 1 if layout is None else len(_layout.PAYLOAD)
        known = range(len(shardings))
        return (
            type(value) is list
            and len(value) == count
            and all(i is None or (type(i) is int and i in known) for i in value)
        )

    numbers = _field(entry, "shardings", are_shardings)
    texts = tuple(None if i is None else shardings[i] for i in numbers)
    return StoredLeaf(path, keys, shape, dtype, texts, layout, words, crc32)


def _nbytes(shape: tuple[int, ...], dtype: str | None) -> int:
    if dtype is None or dtype.startswith(_KEY_DTYPE):
        return 0
    return math.prod(shape) * np.dtype(dtype).itemsize
