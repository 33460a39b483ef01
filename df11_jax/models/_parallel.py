"""Programs on several devices: each device computes its shard, in one program for all of them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._decode import path_name
from df11_jax.models import _cache
from df11_jax.models._cache import Cache
from df11_jax.models._config import Config
from df11_jax.models._sharding import AXIS, STAGES, partition_spec
from df11_jax.models._transformer import Params


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, params: Params, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A function of parameters and further arguments, computed by all devices together.

    Args:
        function: the function that each device computes; it gets the device's shard of the
            parameters, and of the further arguments.
        mesh: the mesh of the devices.
        params: the parameters that are divided over it.
        in_specs: the sharding of the further arguments.
        out_specs: the sharding of the results.

    Raises:
        ValueError: some layers are in host memory.
    """
    if "host_layers" in params:
        raise ValueError(
            f"params have host_layers, but are divided over {mesh.size} devices: layers in host "
            "memory are for one device only"
        )

    def spec(path: Any, _: Any) -> P:
        return partition_spec(path_name(path).split("/"))

    # JAX would check which values differ between devices. Loops begin with zeros, which are the
    # same on all devices, and go on with values that are not: each would have to be marked.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(jax.tree.map_with_path(spec, params, is_leaf=is_df11), *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )


def cache_specs(config: Config) -> Cache:
    """The sharding of a cache: keys, values and states are divided by the heads of each device.

    Their layers are divided over the stages.
    """
    cache = jax.eval_shape(lambda: _cache.init_cache(config, 1, 1))
    # The last inputs of convolutions have the channels of all heads along their last axis.
    specs = {5: P(STAGES, None, AXIS), 4: P(STAGES, None, None, AXIS)}
    return jax.tree.map(lambda leaf: specs.get(leaf.ndim, P()), cache)


def on_one_device(arrays: PyTree) -> PyTree:
    """The shapes of one device's shards of arrays, or of the arrays that shapes stand for."""

    def shard(array: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(array, "sharding", None)
        shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
        return jax.ShapeDtypeStruct(shape, array.dtype)

    return jax.tree.map(shard, arrays)
