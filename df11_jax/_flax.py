"""`DF11Array` in Flax, which knows classes only once they are registered with it; Flax's boxes.

Importing df11_jax does not import Flax, and Flax asks nothing of an object that it does not know.
So the class is registered when modules of Flax are imported, be it before df11_jax or after.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import DF11Array, DF11Slice, is_df11
from df11_jax._brief import brief
from df11_jax._decode import path_name


def open_boxes(tree: PyTree, is_opened: Callable[[str, Any], bool] | None = None) -> PyTree:
    """The tree without Flax's boxes, which say how a leaf of linen's is sharded, around leaves.

    What is in a box is an array to Flax: it shards it, and an nnx module in a linen one takes it
    for the value of a parameter. A compressed leaf stands for itself.

    Args:
        tree: a pytree.
        is_opened: a function of the path of a leaf and the leaf; None for all leaves.
    """
    meta = sys.modules.get("flax.core.meta")  # without it, there are no boxes
    if meta is None:
        return tree

    def open_box(path: tuple[Any, ...], node: Any) -> Any:
        if is_df11(node) or not isinstance(node, meta.AxisMetadata):
            return node
        leaves = jax.tree.leaves_with_path(node, is_leaf=is_df11)
        if len(leaves) != 1:
            return node
        ((inner, leaf),) = leaves
        is_wanted = is_opened is None or is_opened(path_name((*path, *inner)), leaf)
        return leaf if is_wanted else node

    return jax.tree.map_with_path(
        open_box, tree, is_leaf=lambda node: isinstance(node, meta.AxisMetadata)
    )


def move_names(tree: PyTree, paths: Collection[str], axis: int) -> PyTree:
    """The tree, whose variables of nnx name the axes of leaves in the order that these now have.

    Names stay as they are where they are not one for each axis: which axis has none is not known.

    Args:
        tree: a pytree, of which some leaves had an axis moved to the front.
        paths: the paths of these leaves.
        axis: where that axis was.
    """
    nnx = sys.modules.get("flax.nnx")  # without it, there are no variables
    if nnx is None or not paths:
        return tree

    def rename(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return node
        leaves = jax.tree.leaves_with_path(node, is_leaf=is_df11)
        names = node.get_metadata("out_sharding", None)
        if len(leaves) != 1 or not isinstance(names, (tuple, list, PartitionSpec)):
            return node
        ((inner, leaf),) = leaves
        is_moved = path_name((*path, *inner)) in paths
        if not is_moved or not axis < len(names) == leaf.ndim:
            return node
        moved: Any = (names[axis], *names[:axis], *names[axis + 1 :])
        if isinstance(names, PartitionSpec):
            moved = PartitionSpec(*moved)
        return type(node).from_metadata(leaf, node.get_metadata() | {"out_sharding": moved})

    return jax.tree.map_with_path(
        rename, tree, is_leaf=lambda node: is_df11(node) or isinstance(node, nnx.Variable)
    )


class _AtImport(importlib.abc.MetaPathFinder):
    """Finds modules as the finders after this one do, and registers once they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _REGISTER:
            return None
        # Those of an old kind have no `find_spec`; Python itself passes over them.
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _REGISTER[name](module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_with_flax() -> None:
    """Makes Flax know compressed leaves, now or when it is imported."""
    if not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])


def _register_box(meta: Any) -> None:
    # Else a linen module would take the five arrays for its parameter. While the module is being
    # imported, it has no such class yet.
    if hasattr(meta, "AxisMetadata"):
        meta.AxisMetadata.register(DF11Array)
        meta.AxisMetadata.register(DF11Slice)


def _register_state(serialization: Any) -> None:
    def to_state(a: DF11Array) -> dict[str, Any]:
        return dict(zip(_layout.PAYLOAD, a.payload, strict=True))

    def from_state(target: DF11Array, state: Any) -> DF11Array:
        where = serialization.current_path()
        if not isinstance(state, dict) or set(state) != set(_layout.PAYLOAD):
            raise ValueError(
                f"{where}: expected the arrays of a DF11Array like {target!r}, got {brief(state)}. "
                "What was saved plain is restored with a plain target, and compressed after that"
            )
        restored = DF11Array.from_payload((state[name] for name in _layout.PAYLOAD), target.layout)
        stack = _layout.check_payload(restored.payload, target.layout, where)
        header = restored.header.reshape(-1, restored.header.shape[-1])
        layouts = {_layout.unpack_header(row) for row in header}
        if stack != target.stack_shape or layouts - {target.layout}:
            found = (f"{stack} slices with {layout}" for layout in layouts)
            raise ValueError(
                f"{where}: expected a tensor like {target!r}, {target.stack_shape} slices with "
                f"{target.layout}, got {' and '.join(found)}"
            )
        return restored

    if hasattr(serialization, "register_serialization_state"):
        serialization.register_serialization_state(DF11Array, to_state, from_state, override=True)


_REGISTER = {"flax.core.meta": _register_box, "flax.serialization": _register_state}
