"""Mixtures of experts: each token is mapped by the few experts that its router chooses.

The weights of experts are stacks [layers, experts, in, out], of which nothing is taken out as a
whole. Those that the tokens of a step choose are decompressed on the device, each of them once and
all matrices by one call. If they are many, as when prompts are read, they come in groups, so that
no more than `GROUP_BYTES` of them exist decompressed, or those of one token if these are more.

Products are grouped by experts like those of `jax.lax.ragged_dot`. On CPUs and GPUs, that
multiplies all rows, or zeros, by the weights of all experts, and adds them up: as much more work as
there are experts, and NaNs where weights that are not wanted are anything. Here products are
batched over the experts of a group. Each maps the same number of rows, and those that have more
come again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from df11_jax._array import DF11Slice, is_df11
from df11_jax._decode import decompress_params
from df11_jax._product import can_fuse, dot
from df11_jax.models import _collectives
from df11_jax.models._config import Config
from df11_jax.models._layers import activate

# The name of the experts' weights in the parameters of a block, and of what chooses experts.
EXPERTS = "experts"
ROUTERS = frozenset({"gate", "shared_expert_gate"})

# Bytes of decompressed experts at a time, if one token does not choose more.
GROUP_BYTES = 512 * 2**20
# An expert has room for as many rows at least: in the token loop, for those of most batches.
_LEAST_ROWS = 32

Matrices = dict[str, dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerExperts:
    """The experts of a layer, which are not taken out of the stack of all layers.

    Attributes:
        matrices: for each matrix its kernels, [layers, experts, in, out], plain or compressed.
        layer: the index of the layer in the stack.
    """

    matrices: Matrices
    layer: Int[Array, ""]

    def take(self, experts: Int[Array, "*batch"]) -> Matrices:
        """The kernels of some experts, decompressed by one call; those of expert -1 are any."""
        return decompress_params(self.slices(experts))

    def can_fuse(self, config: Config) -> bool:
        """Whether `dot` may fuse products of a single row with all kernels of an expert."""
        stacks = jax.tree.leaves(self.matrices, is_leaf=is_df11)
        return config.may_fuse and all(is_df11(stack) and can_fuse(stack, 1) for stack in stacks)

    def slices(self, experts: Int[Array, "*batch"]) -> Matrices:
        """The kernels of some experts; compressed ones are not decompressed."""
        count = jax.tree.leaves(self.matrices)[0].shape[1]
        index = jnp.where(experts < 0, -1, self.layer * count + experts)

        def pick(stack: Any) -> Any:
            if is_df11(stack):
                return DF11Slice(stack, index)
            flat = stack.reshape(-1, *stack.shape[2:])
            return flat.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")

        return jax.tree.map(pick, self.matrices, is_leaf=is_df11)


class Mixture(nn.Module):
    """Experts of which each token has a few; and one that all have, if the model has such a one.

    Attributes:
        config: the configuration of the transformer.
        shared_expert: the MLP that all tokens have.
    """

    config: Config
    shared_expert: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        """Maps each position by itself."""
        c = self.config

        def gate(name: str, size: int) -> Array:
            return nn.Dense(size, use_bias=False, dtype=jnp.float32, name=name)(x)

        logits = gate("gate", c.experts.count).reshape(-1, c.experts.count)
        if self.is_initializing():
            self.param(EXPERTS, lambda _: _init_kernels(c))
        weights: Any = self.get_variable("params", EXPERTS)
        mapped = experts(x.reshape(-1, c.dim), logits, _layer_experts(weights), c)
        mapped = _collectives.sum_up(mapped.reshape(x.shape), c.axis)
        if self.shared_expert is not None:
            mapped += nn.sigmoid(gate("shared_expert_gate", 1)) * self.shared_expert(x)
        return mapped.astype(x.dtype)


def take_experts(stack: Mapping[str, Any]) -> tuple[dict[str, Any], Matrices | None]:
    """The parameters of all blocks without their experts, and the experts, if there are some."""
    mlp = dict(stack["mlp"])
    experts = mlp.pop(EXPERTS, None)
    return {**stack, "mlp": mlp}, experts


def put_experts(
    block: Mapping[str, Any], experts: Matrices, layer: Int[Array, ""]
) -> dict[str, Any]:
    """The parameters of a block, with its experts from those of all blocks."""
    return {**block, "mlp": {**block["mlp"], EXPERTS: LayerExperts(experts, layer)}}


def _layer_experts(experts: LayerExperts | Matrices) -> LayerExperts:
    """The experts of a block: from `put_experts`, or kernels [experts, in, out] of its own."""
    if isinstance(experts, LayerExperts):
        return experts
    return LayerExperts(jax.tree.map(lambda kernel: kernel[None], experts), jnp.int32(0))


def _init_kernels(config: Config) -> Matrices:
    """Kernels of the experts of a layer, all zeros."""
    c = config
    shapes = {
        "gate_proj": (c.dim, c.hidden),
        "up_proj": (c.dim, c.hidden),
        "down_proj": (c.hidden, c.dim),
    }
    return {
        name: {"kernel": jnp.zeros((c.experts.count, *shape), c.dtype)}
        for name, shape in shapes.items()
    }


def _nbytes(config: Config) -> int:
    """The bytes of the kernels of an expert."""
    return 2 * 3 * config.dim * config.hidden


def experts_at_once(config: Config, tokens: int) -> int:
    """The number of experts that are decompressed at a time; groups are as equal as possible."""
    c = config
    chosen = min(c.experts.count, tokens * c.experts.per_token)
    most = max(c.experts.per_token, GROUP_BYTES // _nbytes(c))
    groups = -(-chosen // most)
    return -(-chosen // groups)


def rows_at_once(config: Config, tokens: int) -> int:
    """The number of tokens that an expert maps at a time: twice as many as choose it on average."""
    average = -(-tokens * config.experts.per_token // config.experts.count)
    return min(tokens, max(_LEAST_ROWS, 2 * average))


def group_nbytes(config: Config, tokens: int) -> int:
    """The bytes of the experts that are decompressed at a time."""
    return experts_at_once(config, tokens) * _nbytes(config)


def activation_nbytes(config: Config, tokens: int) -> int:
    """The bytes of activations within a mixture of experts."""
    c, width = config, jnp.dtype(config.dtype).itemsize
    rows = experts_at_once(c, tokens) * rows_at_once(c, tokens)
    results = jnp.dtype(_result_dtype(c)).itemsize * c.dim * (rows + tokens * c.experts.per_token)
    return width * rows * (c.dim + 3 * c.hidden) + results


def experts(
    x: Float[Array, "tokens dim"],
    logits: Float[Array, "tokens experts"],
    layer: LayerExperts,
    config: Config,
) -> Float[Array, "tokens dim"]:
    """Maps each token by the experts that it chooses, and adds what they make of it.

    Args:
        x: the tokens.
        logits: the logits of all experts for each token, in float32.
        layer: the experts.
        config: the configuration of the transformer. If it has an axis, that is of one device's
            shard, and the result is one of the terms that are to be added.

    Returns:
        The sums, in float32, weighted by the probabilities of the experts.
    """
    chances, chosen = jax.lax.top_k(jax.nn.softmax(logits), config.experts.per_token)
    if config.experts.normed:
        chances /= jnp.sum(chances, axis=-1, keepdims=True)
    if len(x) > 1:
        mapped = _map_many(x, chosen, layer, config)
    elif layer.can_fuse(config):
        each = [_map_fused(x, layer.slices(expert), config) for expert in chosen[0]]
        mapped = jnp.stack(each, axis=1)
    else:
        rows = jnp.broadcast_to(x, (config.experts.per_token, *x.shape))
        mapped = jnp.moveaxis(_map(rows, layer.take(chosen[0]), config), 0, 1)
    return jnp.sum(chances[..., None] * mapped.astype(jnp.float32), axis=1)


def _map_many(
    x: Float[Array, "tokens dim"],
    chosen: Int[Array, "tokens chosen"],
    layer: LayerExperts,
    config: Config,
) -> Float[Array, "tokens chosen dim"]:
    """What the experts that several tokens chose make of them."""
    c = config
    tokens, per_token = chosen.shape
    size, rows = experts_at_once(c, tokens), rows_at_once(c, tokens)
    groups = -(-min(c.experts.count, chosen.size) // size)
    # Choices are counted through: choice i is of token i // per_token.
    order = jnp.argsort(chosen.reshape(-1))  # those of the same expert one after the other
    counts = jnp.bincount(chosen.reshape(-1), length=c.experts.count)
    (needed,) = jnp.nonzero(counts, size=groups * size, fill_value=-1)
    firsts = (jnp.cumsum(counts) - counts)[needed]
    counts = jnp.where(needed < 0, 0, counts[needed])

    def map_group(group: Array, out: Array) -> Array:
        index, first, count = (
            jax.lax.dynamic_slice_in_dim(a, group * size, size) for a in (needed, firsts, counts)
        )
        kernels = layer.take(index)

        def map_rows(turn: Array, out: Array) -> Array:
            row = turn * rows + jnp.arange(rows)
            choice = order.at[first[:, None] + row].get(mode="clip")
            mapped = _map(x[choice // per_token], kernels, c)
            # Rows that an expert does not have go to places that are not there, each to its own.
            nowhere = chosen.size + jnp.arange(size * rows).reshape(size, rows)
            choice = jnp.where(row < count[:, None], choice, nowhere)
            return out.at[choice].set(mapped, mode="drop", unique_indices=True)

        return _repeat(map_rows, out, -(-tokens // rows), -(-jnp.max(count) // rows))

    out = jnp.zeros((chosen.size, c.dim), _result_dtype(c))
    out = _repeat(map_group, out, groups, -(-jnp.sum(needed >= 0) // size))
    return out.reshape(*chosen.shape, c.dim)


def _map(
    x: Float[Array, "experts rows dim"], kernels: Matrices, config: Config
) -> Float[Array, "experts rows dim"]:
    """Rows of each expert, mapped by it."""

    def multiply(x: Array, name: str, dtype: Any) -> Array:
        kernel = kernels[name]["kernel"].astype(x.dtype)
        return jnp.einsum("eri,eio->ero", x, kernel, preferred_element_type=dtype)

    gate, up = (multiply(x, name, x.dtype) for name in ("gate_proj", "up_proj"))
    return multiply(activate(gate, config) * up, "down_proj", _result_dtype(config))


def _map_fused(
    x: Float[Array, "1 dim"], kernels: Matrices, config: Config
) -> Float[Array, "1 dim"]:
    """A single row, mapped by one expert whose kernels are compressed."""
    names = ("gate_proj", "up_proj", "down_proj")
    gate_kernel, up_kernel, down_kernel = (kernels[name]["kernel"] for name in names)
    gate, up = dot(x, [gate_kernel, up_kernel])
    hidden = activate(gate, config) * up
    return dot(hidden, down_kernel, preferred_element_type=_result_dtype(config))


def _result_dtype(config: Config) -> Any:
    """The dtype of what an expert makes of a token: several devices add before they round."""
    return config.dtype if config.axis is None else jnp.float32


def _repeat(
    function: Callable[[Array, Array], Array], carry: Array, most: int, times: Int[Array, ""]
) -> Array:
    """`fori_loop`, but without a loop if that is run once at most."""
    if most == 1:
        return function(jnp.int32(0), carry)
    return jax.lax.fori_loop(0, times, function, carry)
