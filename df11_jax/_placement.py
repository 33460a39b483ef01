"""`device_put` of trees with compressed leaves, which are divided as their shards are."""

import jax
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._compress import naming, place
from df11_jax._decode import path_name
from df11_jax._shards import placements


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
