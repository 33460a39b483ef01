"""Running a decoder on several devices: each computes its share, in one program for all."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._decode import path_name
from df11_jax.models import _cache
from df11_jax.models._cache import Cache
from df11_jax.models._config import Config
from df11_jax.models._shares import AXIS, is_divided
from df11_jax.models._transformer import Params


def find_mesh(params: Params) -> Mesh | None:
    """The mesh that parameters are divided over; None if they are not.

    Args:
        params: arrays or their shapes.

    Raises:
        ValueError: they were divided for several devices, and are not on as many.
    """
    sharding = getattr(jax.tree.leaves(params["embed_tokens"])[0], "sharding", None)
    mesh: Mesh | None = None
    if isinstance(sharding, NamedSharding) and sharding.spec[:1] == (AXIS,):
        assert isinstance(sharding.mesh, Mesh)
        mesh = sharding.mesh
    count, parts = mesh.size if mesh else 1, _count_parts(params)
    if parts != count:
        raise ValueError(
            f"params are divided for {parts} devices, but on {count}: see models.place_params"
        )
    return mesh


def _count_parts(params: Params) -> int:
    """Among how many devices parameters are divided, wherever they are."""
    block = params["layers"]
    layers = block["input_layernorm"]["scale"].shape[0]
    return block["mlp"]["down_proj"]["kernel"].shape[0] // layers if layers else 1


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, params: Params, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A function of parameters and more, computed by all devices together.

    Args:
        function: gets the parameters of a device's share, and what else it is called with.
        mesh: of the devices.
        params: divided over them.
        in_specs: of further arguments.
        out_specs: of results.

    Raises:
        ValueError: some layers are in host memory.
    """
    if "host_layers" in params:
        raise ValueError(
            f"params have host_layers, but are divided over {mesh.size} devices: layers in host "
            "memory are for one device only"
        )
    # Loops begin with zeros, which are the same on all devices, and go on with what is not: to say
    # so wherever it happens would be all that the check of it does.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(param_specs(params), *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )


def param_specs(params: Params) -> PyTree[P]:
    """How each leaf of the parameters is sharded; a compressed one counts as one leaf."""

    def spec(path: Any, _: Any) -> P:
        return P(AXIS) if is_divided(path_name(path).split("/")) else P()

    return jax.tree.map_with_path(spec, params, is_leaf=is_df11)


def cache_specs(config: Config) -> Cache:
    """How a cache is sharded: keys and values by their heads."""
    cache = jax.eval_shape(lambda: _cache.init_cache(config, 1, 1))
    return jax.tree.map(lambda leaf: P(None, None, AXIS) if leaf.ndim == 5 else P(), cache)


def on_one_device(arrays: PyTree) -> PyTree:
    """Shapes of what one device has of arrays, or of their shapes."""

    def part(array: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(array, "sharding", None)
        shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
        return jax.ShapeDtypeStruct(shape, array.dtype)

    return jax.tree.map(part, arrays)
