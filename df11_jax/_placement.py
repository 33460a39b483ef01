"""`device_put` of trees with compressed leaves, which are divided as their shards are."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._compress import compress_onto, naming
from df11_jax._decode import decompress, path_name
from df11_jax._layout import Layout, make_layout
from df11_jax._shards import parts_of, placements


def device_put(params: PyTree, shardings: PyTree) -> PyTree:
    """Places the leaves of a pytree, as `jax.device_put` does it, and divides those compressed.

    `jax.device_put` itself places a compressed leaf wherever each device gets whole parts of it:
    by the PartitionSpec it was compressed for, on fewer devices, or on one. For any other division
    this function decompresses the leaf, and compresses it anew; leaf by leaf.

    Args:
        params: a pytree of arrays, of which some are compressed.
        shardings: a sharding or device for all leaves, or a tree of them, which may end before
            that of `params` does; None for leaves that stay where they are. They are those of the
            plain parameters.

    Returns:
        The same pytree, with the same weights.

    Raises:
        ValueError: a tensor cannot be divided in that way; a note has the leaf's path.
    """
    with_paths, treedef = jax.tree.flatten_with_path(params, is_leaf=is_df11)
    wanted = placements(shardings, treedef)
    placed = []
    for (path, leaf), where in zip(with_paths, wanted, strict=True):
        name = path_name(path)
        with naming(name, "placing"):
            placed.append(leaf if where is None else place(leaf, where, name))
    return jax.tree.unflatten(treedef, placed)


def place(leaf: Any, where: Any, name: str) -> Any:
    """`device_put` of one leaf; `name` is in messages."""
    onto = payload_sharding(leaf.layout, leaf.ndim, where) if is_df11(leaf) else where
    if onto is not None:
        return jax.device_put(leaf, onto)
    return compress_onto(decompress(leaf), divided_as(leaf.layout, leaf.ndim, where), where, name)


def payload_sharding(layout: Layout, ndim: int, where: Any) -> Any:
    """The sharding or device of the five arrays of a tensor, if that divides no part.

    Args:
        layout: the layout of its slices.
        ndim: the number of axes of the tensor, those of a stack included.
        where: the sharding that the tensor is to have, or its device.

    Returns:
        The sharding or device; None if parts would have to be divided.
    """
    if not isinstance(where, NamedSharding):
        return where
    if not any(where.spec):
        return where.update(spec=PartitionSpec())
    counts = parts_of(where, ndim)[ndim - len(layout.shape) :]
    if len(layout.parts) != len(counts):
        return None
    divides = any(n % m for n, m in zip(layout.parts, counts, strict=True))
    return None if divides else where


def divided_as(layout: Layout, ndim: int, where: NamedSharding) -> Layout:
    """The layout that a tensor gets on a mesh.

    Args:
        layout: the layout of its slices elsewhere.
        ndim: the number of axes of the tensor, those of a stack included.
        where: how the tensor is to be sharded.

    Raises:
        ValueError: it cannot be divided so.
    """
    return make_layout(
        layout.shape,
        batch_axes=layout.batch_axes,
        row_axes=layout.row_axes,
        along_columns=layout.along_columns,
        parts=parts_of(where, ndim)[ndim - len(layout.shape) :],
    )
