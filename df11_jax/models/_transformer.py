"""The transformer of all model families; weights may be plain or compressed.

Parameters are one nested dictionary:

    embed_tokens  BFloat16[Array, "devices rows dim"], see `tables`
    layers/...    one array for each tensor of a block, stacked along a leading axis `layers`; the
                  names are those of Hugging Face, but kernels are [layers, in, out]. If layers of
                  several types differ, there is a stack for each type, layers/full/...
    host_layers/...  the last of the blocks, if they are in host memory: like layers, but plain, and
                  copied to the device one by one; normally absent
    norm          BFloat16[Array, "dim"]
    lm_head       like embed_tokens; absent if the two are tied
    embed_tokens_per_layer, per_layer_projection_norm
                  if there are embeddings for each layer, see `_per_layer`

Every other leaf may be a plain array or a `DF11Array`; the code below treats both alike.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name
from df11_jax._product import can_fuse
from df11_jax._promotion import with_promotion
from df11_jax._scan import scan_range, stack_length
from df11_jax._slices import tie
from df11_jax.models import (
    _attention,
    _cache,
    _collectives,
    _experts,
    _per_layer,
    _pipeline,
    _rope,
)
from df11_jax.models._attention import softcap
from df11_jax.models._cache import Cache, Inputs, Slots
from df11_jax.models._checks import check_tokens
from df11_jax.models._config import Config
from df11_jax.models._delta_net import GatedDeltaNet
from df11_jax.models._delta_rule import Steps
from df11_jax.models._experts import Mixture
from df11_jax.models._layer_types import (
    LayerType,
    Number,
    fold_runs,
    layer_types,
    type_config,
)
from df11_jax.models._layers import RMSNorm, activate, multiply, rms_norm
from df11_jax.models._per_layer import PerLayerInputs, TokenInputs

Params = dict[str, Any]
# Tokens, their positions, the slot of the first of them, and how many of them sliding layers keep.
Piece = tuple[Int[Array, "batch seq"], Int[Array, "batch seq"], Array | int, Array | int]


class Attention(nn.Module):
    """Causal grouped-query attention over a static number of slots."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq dim"], slots: Slots, inputs: Inputs, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "batch seq dim"], Slots]:
        """Attends from `inputs.positions`; returns the slots with these tokens added."""
        c = self.config

        heads = {"q_proj": c.heads * (2 if c.output_gate else 1)}
        if not c.shares_keys:
            names = ("k_proj",) if c.keys_are_values else ("k_proj", "v_proj")
            heads |= dict.fromkeys(names, c.kv_heads)
        features = {name: count * c.head_dim for name, count in heads.items()}
        query, *rest = (
            flat.reshape(*x.shape[:2], -1, c.head_dim)
            for flat in multiply(self, x, features, c.qkv_bias)
        )
        if c.output_gate:
            query, gate = query[:, :, ::2], query[:, :, 1::2]

        def turn(name: str, x: Array) -> Array:
            x = RMSNorm(c, name=name)(x) if c.qk_norm else x
            return _rope.rotate(x, inputs.rotation, c.rope)

        query = _rope.grow_queries(turn("q_norm", query), inputs.positions, c.rope)
        key = value = None
        if rest:
            key, value = turn("k_norm", rest[0]), rest[-1]
            if c.value_norm:
                value = rms_norm(value, jnp.ones(c.head_dim), c)
        mixed, slots = _attention.attend(query, key, value, slots, layer, inputs, c)
        if c.output_gate:
            mixed *= nn.sigmoid(gate)
        mixed = mixed.reshape(*x.shape[:2], -1)
        (out,) = multiply(self, mixed, {"o_proj": c.dim}, c.output_bias, c.axis)
        return out, slots


class MLP(nn.Module):
    """`(activation(x gate) * (x up)) down`."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        """Maps each position by itself."""
        c = self.config
        features = {"gate_proj": c.hidden, "up_proj": c.hidden}
        gate, up = multiply(self, x, features, c.mlp_bias)
        gate = activate(gate, c)
        (down,) = multiply(self, gate * up, {"down_proj": c.dim}, c.mlp_bias, c.axis)
        return down


class Block(nn.Module):
    """One transformer block: attention, then MLP, each normed first and added back."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        slots: Any,
        inputs: Any,
        layer: Int[Array, ""],
        tokens: TokenInputs | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Any]:
        """Applies the block to `x`, and fills the slots, or changes the states, of this layer."""
        c = self.config

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(c, name=name)(x)

        # Without norms of outputs, Hugging Face names the norm before the MLP by the attention that
        # precedes it.
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        is_linear = isinstance(inputs, Steps)
        mix = GatedDeltaNet(c, name="linear_attn") if is_linear else Attention(c, name="self_attn")
        mixed, slots = mix(norm("input_layernorm", x), slots, inputs, layer)
        if c.post_norms:
            mixed = norm("post_attention_layernorm", mixed)
        x = x + mixed
        mlp = _mixture(c) if c.experts.count else MLP(c, name="mlp")
        mapped = mlp(norm(before_mlp, x))
        if c.post_norms:
            mapped = norm("post_feedforward_layernorm", mapped)
        x = x + mapped
        if tokens is not None:
            x = x + _per_layer.mix(self, x, tokens)
        if c.layer_scalar:
            x = x * self.param("layer_scalar", nn.initializers.ones, (1,)).astype(c.dtype)
        return x, slots


def _mixture(config: Config) -> Mixture:
    """The experts in the place of the MLP."""
    shared = None
    if config.experts.shared_hidden:
        hidden = dataclasses.replace(config, hidden=config.experts.shared_hidden)
        shared = MLP(hidden, parent=None)
    return Mixture(config, shared, name="mlp")


@with_promotion
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
            their outputs have no meaning. Where a row has tokens in the cache already, no more
            padding may come: windows and states would lose tokens.
        slot: the slot of the first token in the cache, which is the number of tokens before it.
            The cache has room for all of these tokens. (What JAX arrays have in them, as under
            `jit`, is not checked.)
        cache: the cache from `init_cache` or an earlier call.
        config: the configuration of the transformer, static under `jit`.
        keep: the number of tokens that sliding layers keep; None for all. The next call begins with
            the tokens that they do not keep. Of linear layers, the states after these tokens are
            kept, and the outputs of the others have no meaning.

    Returns:
        The normed output of the last block, from which `project` computes logits, and the cache
        with these tokens added.

    Raises:
        ValueError: positions, `slot`, `keep` or the cache do not fit the tokens, as far as that is
            known before the program runs; the cache is that of another configuration; or the
            parameters do not have as many layers as the configuration says, or have leaves that it
            does not know.
    """
    check_tokens(tokens, positions, slot, keep, cache, config)
    tokens = jnp.asarray(tokens)
    keep = tokens.shape[1] if keep is None else keep
    x, cache = forward_pieces(params, lambda _: (tokens, positions, slot, keep), 1, cache, config)
    return rms_norm(x, params["norm"], config), cache


def forward_pieces(
    params: Params,
    piece: Callable[[Int[Array, ""]], Piece],
    count: int,
    cache: Cache,
    config: Config,
) -> tuple[Float[Array, "batch seq dim"], Cache]:
    """Computes the output of the last block for tokens that come in pieces, one after the other.

    Args:
        params: parameters from `load_params`; each leaf is plain or compressed.
        piece: `piece(i)` is a piece: what `forward` wants to know of it. All have the same shapes.
        count: the number of pieces, static.
        cache: the cache from `init_cache` or an earlier call.
        config: the configuration of the transformer.

    Returns:
        The output for the last piece, which is not normed, and the cache.

    Raises:
        ValueError: the parameters do not have as many layers as the configuration says, or have
            leaves that it does not know.
    """
    _check_leaves(params, config)

    def embed(i: Int[Array, ""]) -> Array:
        return _embed(params, piece(i)[0], config)

    def run(i: Int[Array, ""], x: Array, cache: Cache) -> tuple[Array, Cache]:
        return _run_blocks(params, x, *piece(i), cache, config)

    return _pipeline.run_pieces(embed, run, count, cache, config.stages)


def _embed(
    params: Params, tokens: Int[Array, "batch seq"], config: Config
) -> Float[Array, "batch seq dim"]:
    """The activations that go into the first block."""
    x = _collectives.look_up(params["embed_tokens"], tokens, config.is_divided)
    x = x.astype(config.dtype)
    if config.embedding_scale != 1:
        # Rounded, as when the models were trained: 55.5 for the square root of 3072.
        x = x * jnp.asarray(config.embedding_scale, config.dtype)
    return x


def _run_blocks(
    params: Params,
    x: Float[Array, "batch seq dim"],
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    slot: Int[Array, ""] | int,
    keep: Int[Array, ""] | int,
    cache: Cache,
    config: Config,
) -> tuple[Float[Array, "batch seq dim"], Cache]:
    """Applies the blocks that are here to the activations of some tokens; see `forward`."""
    c = config
    on_device, in_host_memory = _count_layers(params, c)
    positions, slot = jnp.asarray(positions, jnp.int32), jnp.asarray(slot, jnp.int32)
    cache, inputs = _cache.take_slots(cache, positions, slot, jnp.asarray(keep, jnp.int32), c)
    per_layer = _per_layer.look_up(params, tokens, x, c) if c.per_layer else None
    carry = x, cache
    carry = _scan_layers(params["layers"], carry, inputs, c, range(on_device), per_layer)
    if in_host_memory:
        fetch = functools.partial(jax.device_put, device=jax.memory.Space.Device)
        layers = range(on_device, c.layers)
        carry = _scan_layers(params["host_layers"], carry, inputs, c, layers, None, fetch)
    x, cache = carry
    return x, _cache.without_recent(cache)


def _check_leaves(params: Params, config: Config) -> None:
    """Checks that no leaf would be left out without a word, such as biases that a user has added.

    Raises:
        ValueError: the parameters have leaves that the configuration does not know.
    """
    blocks, tops = _block_leaves(config), {"embed_tokens", "norm"}
    if not config.tied:
        tops.add("lm_head")
    if config.per_layer is not None:
        tops |= {"embed_tokens_per_layer", "per_layer_projection_norm"}
    for keys, _ in jax.tree.leaves_with_path(params, is_leaf=is_df11):
        top, _, name = path_name(keys).partition("/")
        known = name in blocks if top in ("layers", "host_layers") else top in tops
        if not known:
            raise ValueError(
                f"params have {path_name(keys)}, which is not used by a {config.family} "
                f"transformer of this configuration (tied={config.tied}, "
                f"qkv_bias={config.qkv_bias}, output_bias={config.output_bias}, "
                f"mlp_bias={config.mlp_bias}, qk_norm={config.qk_norm}): remove it, or change the "
                "configuration"
            )


@functools.lru_cache(maxsize=8)
def _block_leaves(config: Config) -> frozenset[str]:
    """The names of the leaves of blocks, below those of their stacks."""
    return frozenset(path_name(keys) for keys, _ in jax.tree.leaves_with_path(block_shapes(config)))


def _count_layers(params: Params, config: Config) -> tuple[int, int]:
    """The number of layers on the device, and of those in host memory.

    Raises:
        ValueError: the configuration says another number of layers, or layers are in host memory
            that cannot be there.
    """
    if config.layers_differ:
        if "host_layers" in params:
            raise ValueError(
                f"params have host_layers, which are not supported for a {config.family} "
                "transformer, whose layers differ: keep all layers on the device"
            )
        stacks = {type_: _count_stack(stack) for type_, stack in params["layers"].items()}
        if stacks != (expected := dict(Counter(layer_types(config)))):
            raise ValueError(
                f"params have layers of the types {stacks}, expected {expected}, as the "
                "configuration says"
            )
        return config.layers, 0
    on_device, in_host_memory = (
        _count_stack(params[name]) if name in params else 0 for name in ("layers", "host_layers")
    )
    if on_device + in_host_memory != config.layers:
        raise ValueError(
            f"params have {on_device} layers, and {in_host_memory} in host memory, expected "
            f"{config.layers} in all, as the configuration says"
        )
    return on_device, in_host_memory


def _count_stack(stack: Params) -> int:
    """The number of layers in a stack."""
    return stack_length(_experts.take_experts(stack)[0])


def _scan_layers(
    stack: Params,
    carry: tuple[Array, Cache],
    inputs: Mapping[LayerType, Inputs | Steps],
    config: Config,
    layers: range,
    per_layer: PerLayerInputs | None,
    fetch: Callable[[Params], Params] | None = None,
) -> tuple[Array, Cache]:
    """Applies the blocks of a stack, one after the other.

    Args:
        stack: the parameters of these layers; if they differ, those of all layers, by type.
        carry: the activations, and the cache.
        inputs: the inputs of the blocks of each type.
        config: the configuration of the transformer.
        layers: the indices of these layers among all layers of the transformer.
        per_layer: the embeddings of the tokens for each layer, if there are some.
        fetch: a function that copies the parameters of one block to the device, with all of its
            experts; None if they are there.

    Returns:
        The activations after the last block, and the cache with the slots of these layers filled.
    """
    types, stacked = layer_types(config), config.layers_differ
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
        own, begin = stack, first
        if stacked:
            # Tied, so that the first block is not decompressed or copied ahead of the run before.
            own, begin = stack[type_], tie(jnp.asarray(number, jnp.int32), x)
        experts = None
        if fetch is None:
            own, experts = _experts.take_experts(own)
        block = Block(type_config(config, type_))

        def block_fn(carry: Any, block_params: Params, index: Array) -> Any:
            if fetch is not None:
                block_params = fetch(block_params)
            if experts is not None:
                block_params = _experts.put_experts(block_params, experts, index)
            variables, done = {"params": block_params}, index - begin
            tokens = None if per_layer is None else per_layer.of(first + done)
            return block.apply(variables, *carry, inputs[type_], number + done, tokens)

        carry = x, cache.of(type_)
        (x, slots), end = scan_range(block_fn, carry, own, begin, count, is_lazy)
        return first + count if stacked else end, x, cache.replace(type_, slots)

    run = types[layers.start : layers.stop]
    _, x, cache = fold_runs(scan_run, (jnp.int32(0), *carry), run, types[: layers.start])
    return x, cache


@with_promotion
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

    Raises:
        ValueError: the output head has fewer rows than the configuration has tokens.
    """
    name = "embed_tokens" if config.tied else "lm_head"
    logits = _collectives.project(params[name], x, config.is_divided, config.may_fuse)
    if logits.shape[-1] < config.vocab:
        raise ValueError(
            f"params have {logits.shape[-1]} rows in {name}, expected at least {config.vocab}, the "
            "vocabulary of the configuration"
        )
    logits = logits[..., : config.vocab]
    return softcap(logits, config.logit_softcap)


@with_promotion
def block_shapes(config: Config) -> Params:
    """The shapes of the parameters of one block; if blocks differ, of one block of each type."""
    config = dataclasses.replace(config, axis=None)  # there is no mesh here

    def init(type_: LayerType) -> Any:
        x, zero = jnp.zeros((1, 1, config.dim), config.dtype), jnp.int32(0)
        cache, inputs = _cache.take_slots(
            _cache.init_cache(config, 1, 1), zero[None, None], zero, zero, config
        )
        tokens = _per_layer.empty_inputs(config)
        block = Block(type_config(config, type_))
        return block.init(jax.random.key(0), x, cache.of(type_), inputs[type_], zero, tokens)[
            "params"
        ]

    types = dict.fromkeys(layer_types(config))
    shapes: Params = {type_: jax.eval_shape(functools.partial(init, type_)) for type_ in types}
    return shapes if config.layers_differ else next(iter(shapes.values()))
