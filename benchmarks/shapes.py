"""Shapes of parameters of any size, to compile programs without them."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from stack_shapes import compressed_stack

from df11_jax._take import rows_in_piece
from df11_jax.models import Config, Params, _experts, _programs, _sharding
from df11_jax.models._devices import ParamDevices
from df11_jax.models._leaf_builders import count_stack_axes, is_candidate_leaf, slice_layout
from df11_jax.models._parallel import on_one_device
from df11_jax.models._transformer import block_shapes


def block_nbytes(config: Config, devices: int = 1) -> int:
    """Bytes of the weights of the largest block on each device, not compressed.

    Of a mixture, as many experts count as are decompressed at a time when prompts are read.
    """
    shard = _sharding.shard_config(config, devices)
    blocks = block_shapes(shard)
    each = blocks.values() if config.layers_differ else [blocks]
    others = (_experts.take_experts(block)[0] for block in each)
    nbytes = max(sum(2 * leaf.size for leaf in jax.tree.leaves(block)) for block in others)
    if config.experts.count:
        nbytes += _experts.group_nbytes(shard, _programs.PIECE_TOKENS)
    return nbytes


def piece_nbytes(params: Params) -> int:
    """Bytes of the piece of a table that each device decompresses at a time."""
    table = on_one_device(params.get("lm_head", params["embed_tokens"]))
    return 2 * rows_in_piece(*table.shape[1:]) * table.shape[2]


def cache_copies(program: jax.stages.Compiled) -> list[str]:
    """The whole caches that a program copies, but for the zeros that they begin with."""
    text = program.as_text()
    outer = text.partition("\n")[0]  # the shapes of what goes in and comes out
    copies = re.findall(r"= ((?:u16|f32)(\[\d+,\d+,\d+,\d+,\d+\]))\S* copy\((%[\w.\-]+)", text)
    zeros = set(re.findall(r"(%[\w.\-]+) = \S+ broadcast\(", text))
    return [
        shape
        for array, shape, operand in copies
        if array in outer and "broadcast" not in operand and operand not in zeros
    ]


def param_shapes(
    config: Config,
    *,
    compress: bool,
    sharding: jax.sharding.Sharding | None = None,
    devices: Sequence[jax.Device] = (),
    stages: int = 1,
) -> Params:
    """Shapes of what `load_params` returns, with exponents as normal weights have them.

    Args:
        config: the configuration of the transformer.
        compress: False for plain parameters.
        sharding: the sharding of all leaves, if there are not several devices.
        devices: the devices that they are divided over, if there are several.
        stages: the number of stages that these are divided into.
    """
    target = ParamDevices(config, devices or None, stages)
    shard = _sharding.shard_config(config, target.count // stages)

    def leaf(path, shape):
        def array(shape, dtype):
            where = target.of(path) if target.count > 1 else sharding
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        if not compress or not is_candidate_leaf(path, shape):
            return array(shape, jnp.float32 if _sharding.is_wide(path) else jnp.bfloat16)
        axes = count_stack_axes(path)
        return compressed_stack(shape[:axes], slice_layout(path, shape), array)

    def stack(keys, x):
        path = ("layers", *(key.key for key in keys))
        return leaf(path, (_sharding.leaf_length(path, config, target.count, stages), *x.shape))

    def table(name):
        return leaf((name,), _sharding.table_shape(config, target.count, name))

    layers = jax.tree.map_with_path(stack, block_shapes(shard))
    params = {"layers": layers, "norm": leaf(("norm",), (config.dim,))}
    params["embed_tokens"] = table("embed_tokens")
    if not config.tied:
        params["lm_head"] = table("lm_head")
    if config.per_layer is not None:
        params["embed_tokens_per_layer"] = table("embed_tokens_per_layer")
        name = "per_layer_projection_norm"
        params[name] = leaf((name,), (config.per_layer.dim,))
    return params
