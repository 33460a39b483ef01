"""Nested dicts as leaves with names, which are paths whose keys are joined by `/`, and back."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._brief import brief
from df11_jax._decode import path_name
from df11_jax._files.safetensors import check_name
from df11_jax._files.untrusted_json import parse_json


class Structure(NamedTuple):
    """What the names of leaves do not tell.

    Attributes:
        integers: the paths whose last key is an integer.
        none: the paths at which None is.
        empty: the paths at which an empty dict is.
    """

    integers: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The structure as text, without what is empty."""
        return json.dumps({key: paths for key, paths in self._asdict().items() if paths})

    @classmethod
    def from_json(cls, text: str, where: str) -> "Structure":
        """Reads the text.

        Raises:
            ValueError: the text is not that of a structure.
        """
        try:
            fields = parse_json(text.encode(), unique=True)
            if all(isinstance(paths, list) for paths in fields.values()):
                for path in itertools.chain(*fields.values()):
                    check_name(path)
                return cls(**{key: tuple(paths) for key, paths in fields.items()})
        except (AttributeError, TypeError, ValueError):
            pass
        raise ValueError(f"{where}: structure is {brief(text)}, expected lists of paths")


def flatten(params: PyTree) -> tuple[dict[str, Any], Structure]:
    """The leaves of nested dicts by their names, and the structure.

    Raises:
        ValueError: a container is not a dict, a key is neither a string nor an integer, or a key
            contains `/` or `:`.
    """
    leaves: dict[str, Any] = {}
    kinds: dict[str, type] = {}
    none, empty = [], []
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=_is_leaf):
        if not keys and _is_empty_dict(leaf):
            continue
        values = [key.key for key in keys if isinstance(key, DictKey)]
        if not keys or len(values) < len(keys) or not all(map(_is_key, values)):
            others = [i for i, key in enumerate(keys) if not isinstance(key, DictKey)]
            hint = (
                f"; {path_name(keys[: others[0]]) if others[0] else 'this'} is no dict. "
                "dict(enumerate(...)) makes one of a list; df11_jax.orbax saves other containers"
                if others
                else ""
            )
            raise ValueError(
                f"{path_name(keys)}: only nested dicts can be saved, with keys that are integers, "
                f"or strings free of '/' and ':'{hint}"
            )
        paths = list(_paths(map(str, values)))
        for path, value in zip(paths, values, strict=True):
            if kinds.setdefault(path, type(value)) is not type(value):
                raise ValueError(
                    f"{path}: an integer and a string with the same digits are keys of one dict, "
                    "of which one can be saved; rename one"
                )
        if leaf is None:
            none.append(paths[-1])
        elif _is_empty_dict(leaf):
            empty.append(paths[-1])
        else:
            leaves[paths[-1]] = leaf
    integers = (path for path, kind in kinds.items() if kind is int)
    return leaves, Structure(tuple(integers), tuple(none), tuple(empty))


def nest(leaves: Mapping[str, Any], structure: Structure, where: str) -> dict[Any, Any]:
    """Nested dicts of leaves.

    Args:
        leaves: the leaves by their names.
        structure: the structure.
        where: the checkpoint, for messages.

    Raises:
        ValueError: a name is that of a leaf and of a container, or a key is not an integer that
            is to be one.
    """
    integers = set(structure.integers)

    def key(path: str) -> str | int:
        last = path.rpartition("/")[2]
        try:
            return int(last) if path in integers else last
        except ValueError:
            raise ValueError(f"{where}: {path}: {last!r} is not an integer") from None

    params: dict[Any, Any] = {}
    none = dict.fromkeys(structure.none)
    empty: dict[str, Any] = {path: {} for path in structure.empty}
    for name, leaf in itertools.chain(leaves.items(), none.items(), empty.items()):
        *parents, last = _paths(name.split("/"))
        place = params
        for path in parents:
            place = place.setdefault(key(path), {})
            if not isinstance(place, dict):
                raise ValueError(f"{where}: {name}: {path} is a leaf as well")
        if key(last) in place:
            raise ValueError(f"{where}: {name}: is a leaf, and there are leaves below it")
        place[key(last)] = leaf
    return params


def _paths(parts: Iterable[str]) -> Iterator[str]:
    """The paths that lead to a leaf, the last of which is its name."""
    return itertools.accumulate(parts, "{}/{}".format)


def _is_leaf(node: Any) -> bool:
    return node is None or is_df11(node) or _is_empty_dict(node)


def _is_empty_dict(node: Any) -> bool:
    return isinstance(node, Mapping) and not node


def _is_key(value: Any) -> bool:
    return type(value) is int or (type(value) is str and not set("/:") & set(value))
