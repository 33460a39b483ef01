"""The transformer of all model families; weights may be plain or compressed.

Parameters are one nested dictionary:

    embed_tokens  BFloat16[Array, "groups rows dim"], see `tables`
    layers/...    one array for each tensor of a block, stacked along a leading axis `layers`; the
                  names are those of Hugging Face, but kernels are [layers, in, out]
    host_layers/...  the last of the blocks, if they are in host memory: like layers, but plain, and
                  copied to the device one by one; normally absent
    norm          BFloat16[Array, "dim"]
    lm_head       like embed_tokens; absent if the two are tied

Every other leaf may be a plain array or a `DF11Array`; the code below treats both alike.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from df11_jax._array import DF11Array, DF11Slice
from df11_jax._product import can_fuse, dot
from df11_jax._scan import scan_range, stack_length
from df11_jax.models import _attention, _cache, _collectives, _experts, _rope
from df11_jax.models._attention import softcap
from df11_jax.models._cache import Cache, Inputs, Slots
from df11_jax.models._config import Config
from df11_jax.models._experts import Mixture
from df11_jax.models._layer_types import LayerType, Number, fold_runs, layer_types

Params = dict[str, Any]


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, computed in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Norms each vector of the last axis."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x, scale, self.config)


class Attention(nn.Module):
    """Causal grouped-query attention over a static number of slots."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq dim"], slots: Slots, inputs: Inputs, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "batch seq dim"], Slots]:
        """Attends from `inputs.positions`; returns the slots with these tokens added."""
        c = self.config

        heads = {"q_proj": c.heads, "k_proj": c.kv_heads, "v_proj": c.kv_heads}
        features = {name: count * c.head_dim for name, count in heads.items()}
        query, key, value = (
            flat.reshape(*x.shape[:2], -1, c.head_dim)
            for flat in _multiply(self, x, features, c.qkv_bias)
        )
        if c.qk_norm:
            query = RMSNorm(c, name="q_norm")(query)
            key = RMSNorm(c, name="k_norm")(key)
        query, key = (_rope.rotate(x, inputs.rotation, c.rope) for x in (query, key))
        query = _rope.grow_queries(query, inputs.positions, c.rope)
        mixed, slots = _attention.attend(query, key, value, slots, layer, inputs, c)
        mixed = mixed.reshape(*x.shape[:2], -1)
        sum_up = _collectives.summing_dot_general(c.axis)
        (out,) = _multiply(self, mixed, {"o_proj": c.dim}, c.output_bias, sum_up)
        return out, slots


class MLP(nn.Module):
    """`(activation(x gate) * (x up)) down`."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        """Maps each position by itself."""
        c = self.config
        features = {"gate_proj": c.hidden, "up_proj": c.hidden}
        gate, up = _multiply(self, x, features, c.mlp_bias)
        sum_up = _collectives.summing_dot_general(c.axis)
        (down,) = _multiply(
            self, _experts.activate(gate, c) * up, {"down_proj": c.dim}, c.mlp_bias, sum_up
        )
        return down


class Block(nn.Module):
    """One transformer block: attention, then MLP, each normed first and added back."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq dim"], slots: Slots, inputs: Inputs, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "batch seq dim"], Slots]:
        """Applies the block to `x`, and fills the slots of this layer."""
        c = self.config

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(c, name=name)(x)

        # Without norms of outputs, Hugging Face names the norm before the MLP by the attention that
        # precedes it.
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        mixed, slots = Attention(c, name="self_attn")(
            norm("input_layernorm", x), slots, inputs, layer
        )
        if c.post_norms:
            mixed = norm("post_attention_layernorm", mixed)
        x = x + mixed
        mlp = _mixture(c) if c.experts.count else MLP(c, name="mlp")
        mapped = mlp(norm(before_mlp, x))
        if c.post_norms:
            mapped = norm("post_feedforward_layernorm", mapped)
        return x + mapped, slots


def _mixture(config: Config) -> Mixture:
    """The experts in the place of the MLP."""
    shared = None
    if config.experts.shared_hidden:
        hidden = dataclasses.replace(config, hidden=config.experts.shared_hidden)
        shared = MLP(hidden, parent=None)
    return Mixture(config, shared, name="mlp")


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    slot: Int[Array, ""] | int,
    cache: Cache,
    config: Config,
    keep: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "batch seq dim"], Cache]:
    """Computes the output of the transformer for tokens that follow those in the cache.

    Args:
        params: parameters from `load_params`; each leaf is plain or compressed.
        tokens: the next tokens of each sequence.
        positions: the positions of the tokens, counted from 0. Tokens that only pad a row come
            before all others of it and have the largest int32: no other token attends to them, and
            their outputs have no meaning.
        slot: the slot of the first token in the cache, which is the number of tokens before it.
            The cache has room for all of these tokens.
        cache: the cache from `init_cache` or an earlier call.
        config: the configuration of the transformer, static under `jit`.
        keep: the number of tokens that sliding layers keep; None for all. The next call begins with
            the tokens that they do not keep.

    Returns:
        The normed output of the last block, from which `project` computes logits, and the cache
        with these tokens added.

    Raises:
        ValueError: the parameters do not have as many layers as the configuration says.
    """
    c = config
    on_device, in_host_memory = _count_layers(params, c)
    positions, slot = jnp.asarray(positions, jnp.int32), jnp.asarray(slot, jnp.int32)
    keep = jnp.asarray(tokens.shape[1] if keep is None else keep, jnp.int32)
    inputs = {}
    for type_ in sorted(set(layer_types(c))):
        slots, inputs[type_] = _cache.assign_slots(cache.of(type_), positions, slot, keep, type_, c)
        cache = cache.replace(type_, slots)
    x = _collectives.look_up(params["embed_tokens"], tokens, c.axis).astype(c.dtype)
    if c.embedding_scale != 1:
        # Rounded, as when the models were trained: 55.5 for the square root of 3072.
        x = x * jnp.asarray(c.embedding_scale, c.dtype)
    carry = x, cache
    carry = _scan_layers(params["layers"], carry, inputs, c, range(on_device))
    if in_host_memory:
        fetch = functools.partial(jax.device_put, device=jax.memory.Space.Device)
        layers = range(on_device, c.layers)
        carry = _scan_layers(params["host_layers"], carry, inputs, c, layers, fetch)
    x, cache = carry
    return rms_norm(x, params["norm"], c), cache


def _count_layers(params: Params, config: Config) -> tuple[int, int]:
    """The number of layers on the device, and of those in host memory.

    Raises:
        ValueError: the configuration says another number of layers.
    """
    on_device, in_host_memory = (
        stack_length(_experts.take_experts(params[name])[0]) if name in params else 0
        for name in ("layers", "host_layers")
    )
    if on_device + in_host_memory != config.layers:
        raise ValueError(
            f"params have {on_device} layers, and {in_host_memory} in host memory, expected "
            f"{config.layers} in all, as the configuration says"
        )
    return on_device, in_host_memory


def _scan_layers(
    stack: Params,
    carry: tuple[Array, Cache],
    inputs: Mapping[LayerType, Inputs],
    config: Config,
    layers: range,
    fetch: Callable[[Params], Params] | None = None,
) -> tuple[Array, Cache]:
    """Applies the blocks of a stack, one after the other.

    Args:
        stack: the parameters of these layers.
        carry: the activations, and the cache.
        inputs: the inputs of the blocks of each type.
        config: the configuration of the transformer.
        layers: the indices of these layers among all layers of the transformer.
        fetch: a function that copies the parameters of one block to the device, with all of its
            experts; None if they are there.

    Returns:
        The activations after the last block, and the cache with the slots of these layers filled.
    """
    block, types = Block(config), layer_types(config)
    experts = None
    if fetch is None:
        stack, experts = _experts.take_experts(stack)
    rows = math.prod(carry[0].shape[:-1])

    # Where no product can be fused, because there are many rows or because of the GPUs that are
    # here, all of a block is decompressed by one call. Where some can, `dot` decides when the
    # program is lowered: it may be for other devices than those that are here.
    def is_lazy(leaf: DF11Array) -> bool:
        # `dot` would multiply by the transpose of a kernel whose pairs are along columns.
        return config.may_fuse and can_fuse(leaf, rows) and not leaf.layout.along_columns

    # A cache in the carry is updated in place; with one in xs and one in ys, there would be two.
    def scan_run(carry: Any, type_: LayerType, number: Number, count: int) -> Any:
        first, x, cache = carry

        def block_fn(carry: Any, block_params: Params, index: Array) -> Any:
            if fetch is not None:
                block_params = fetch(block_params)
            if experts is not None:
                block_params = _experts.put_experts(block_params, experts, index)
            variables = {"params": block_params}
            return block.apply(variables, *carry, inputs[type_], number + index - first)

        carry = x, cache.of(type_)
        (x, slots), end = scan_range(block_fn, carry, stack, first, count, is_lazy)
        return end, x, cache.replace(type_, slots)

    run = types[layers.start : layers.stop]
    _, x, cache = fold_runs(scan_run, (jnp.int32(0), *carry), run, types[: layers.start])
    return x, cache


def project(
    params: Params, x: Float[Array, "*batch dim"], config: Config
) -> Float[Array, "*batch vocab"]:
    """Logits of the next tokens.

    Args:
        params: the parameters that `forward` got.
        x: the output of `forward`, or a part of it.
        config: the configuration of the transformer.

    Returns:
        Logits in float32.
    """
    table = params["embed_tokens"] if config.tied else params["lm_head"]
    logits = _collectives.project(table, x, config.axis)[..., : config.vocab]
    return softcap(logits, config.logit_softcap)


def block_shapes(config: Config) -> Params:
    """The shapes of the parameters of one block."""
    config = dataclasses.replace(config, axis=None)  # there is no mesh here

    def init() -> Any:
        x = jnp.zeros((1, 1, config.dim), config.dtype)
        slots, zero = _cache.init_slots(config, 1, 1, 1), jnp.int32(0)
        slots, inputs = _cache.assign_slots(slots, slots.positions, zero, 1, "full", config)
        return Block(config).init(jax.random.key(0), x, slots, inputs, zero)

    return jax.eval_shape(init)["params"]


def rms_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, " dim"], config: Config
) -> Float[Array, "*batch dim"]:
    """`x / rms(x) * scale` in float32, returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    scale = scale.astype(jnp.float32) + (1 if config.unit_offset else 0)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + config.norm_eps) * scale).astype(x.dtype)


def _multiply(
    module: nn.Module,
    x: Float[Array, "batch seq in_features"],
    features: Mapping[str, int],
    bias: bool,
    dot_general: Callable[..., Array] | None = None,
) -> list[Float[Array, "batch seq _"]]:
    """The outputs of dense layers of a module for the same `x`.

    Args:
        module: the module, in its compact method.
        x: the inputs.
        features: the names of the layers, and the numbers of their outputs.
        bias: whether they have biases.
        dot_general: the product of layers whose kernels are arrays; None for the usual one.
    """
    dtype = module.config.dtype
    weights: dict[str, Params] = {
        name: module.get_variable("params", name, {}) for name in features
    }
    # Kernels that are still compressed are multiplied by one call.
    slices = {
        name: layer["kernel"]
        for name, layer in weights.items()
        if isinstance(layer.get("kernel"), DF11Slice)
    }
    products = dict(zip(slices, dot(x, list(slices.values())), strict=True))
    outputs = []
    for name, size in features.items():
        if name not in slices:
            layer = nn.Dense(size, bias, dtype=dtype, name=name, dot_general=dot_general)
            outputs.append(layer(x))
        elif bias:
            outputs.append(products[name] + weights[name]["bias"].astype(dtype))
        else:
            outputs.append(products[name])
    return outputs
