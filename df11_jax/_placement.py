"""`device_put` of trees with compressed leaves, which are divided as their shards are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._compress_tensor import compress_as
from df11_jax._decode import decompress, path_name
from df11_jax._host_arrays import cpu_device
from df11_jax._leaves import is_array, naming
from df11_jax._shards import divided_as, payload_sharding, placements


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


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are on a mesh, or on none, whatever mesh the caller has set."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(np.empty((), object), ()) if mesh is None else mesh)


def own_mesh(leaf: DF11Array) -> contextlib.AbstractContextManager[Any]:
    """A context in which a leaf is computed with where it is, whatever mesh the caller has set.

    One that is on the host is computed with on the default device.
    """
    if not isinstance(leaf.header, jax.Array):
        return on_mesh(None)
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return on_mesh(sharding.mesh)
    if len(sharding.device_set) == 1:
        return on_mesh(_mesh_of(*sharding.device_set))
    return contextlib.nullcontext()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """A context in which programs take what is on the host where it is: on a CPU, if there is one.

    A mesh that the caller has set would come before the default device, and each of its devices
    would get all of it.
    """
    cpu = cpu_device()
    mesh = contextlib.nullcontext() if cpu is None else on_mesh(_mesh_of(cpu))
    with jax.default_device(cpu), mesh:
        yield


def _mesh_of(device: jax.Device) -> Mesh:
    return Mesh(np.array([device]), ("device",))


def place(leaf: Any, where: Any, name: str) -> Any:
    """`df11_jax.device_put` of one leaf.

    Args:
        leaf: the leaf; what is neither an array nor compressed stays as it is.
        where: its sharding or device.
        name: the name of the leaf; errors have it.
    """
    if not is_df11(leaf):
        return jax.device_put(leaf, where) if is_array(leaf) else leaf
    onto = payload_sharding(leaf.layout, leaf.ndim, where)
    if onto is not None:
        return jax.device_put(leaf, onto)
    layout = divided_as(leaf.layout, leaf.ndim, where)
    with own_mesh(leaf):
        # In host memory, programs compute nothing.
        weights = decompress(jax.device_put(leaf, jax.memory.Space.Device))
    return compress_as(weights, layout, name, where)
