"""The decoder of Llama 3, Qwen 2.5, Qwen 3 and Gemma 3, whose weights may be plain or compressed.

Parameters are one nested dictionary:

    embed_tokens  BFloat16[Array, "groups rows dim"], see `_table`
    layers/...    one array per tensor of a block, stacked: leading axis `layers`; called as
                  Hugging Face calls them, but kernels are [layers, in, out]
    host_layers/...  the last of the blocks, if they are in host memory: like layers, but plain, and
                  copied to the device one by one; normally absent
    norm          BFloat16[Array, "dim"]
    lm_head       like embed_tokens; absent if the two are tied

Each other leaf may be a plain array or a `DF11Array`; nothing below asks which.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import df11_jax
from df11_jax.models import _attention, _rope, _table
from df11_jax.models._attention import Cache, Inputs, Layer, init_cache, softcap
from df11_jax.models._config import Config

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
    """Causal grouped-query attention over a cache of static length."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq dim"], cache: Cache, inputs: Inputs, layer: Layer
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """Attends from `inputs.positions`; returns the cache with their slots filled."""
        c = self.config

        def project(name: str, heads: int) -> Float[Array, "batch seq heads head_dim"]:
            flat = _dense(c, heads * c.head_dim, c.qkv_bias, name)(x)
            return flat.reshape(*x.shape[:2], heads, c.head_dim)

        query = project("q_proj", c.heads)
        key = project("k_proj", c.kv_heads)
        value = project("v_proj", c.kv_heads)
        if c.qk_norm:
            query = RMSNorm(c, name="q_norm")(query)
            key = RMSNorm(c, name="k_norm")(key)
        rotation = inputs.rotations.choose(layer.sliding)
        query, key = _rope.rotate(query, rotation), _rope.rotate(key, rotation)

        cache = cache._replace(
            keys=_attention.write(cache.keys, key, layer, inputs.slot),
            values=_attention.write(cache.values, value, layer, inputs.slot),
        )
        mixed = _attention.attend(query, cache, inputs, layer, c)
        return _dense(c, c.dim, c.output_bias, "o_proj")(mixed.reshape(*x.shape[:2], -1)), cache


class MLP(nn.Module):
    """`(activation(x gate) * (x up)) down`."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        """Maps each position by itself."""
        c = self.config
        gate = _dense(c, c.hidden, c.mlp_bias, "gate_proj")(x)
        gate = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        up = _dense(c, c.hidden, c.mlp_bias, "up_proj")(x)
        return _dense(c, c.dim, c.mlp_bias, "down_proj")(gate * up)


class Block(nn.Module):
    """One transformer block: attention, then MLP, each normed first and added back."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq dim"], cache: Cache, inputs: Inputs, layer: Layer
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """Advances `x`, and the cache of this layer."""
        c = self.config

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(c, name=name)(x)

        # Hugging Face calls the norm before the MLP by what it comes after, if only one does.
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        mixed, cache = Attention(c, name="self_attn")(
            norm("input_layernorm", x), cache, inputs, layer
        )
        if c.post_norms:
            mixed = norm("post_attention_layernorm", mixed)
        x = x + mixed
        mapped = MLP(c, name="mlp")(norm(before_mlp, x))
        if c.post_norms:
            mapped = norm("post_feedforward_layernorm", mapped)
        return x + mapped, cache


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    slot: Int[Array, ""] | int,
    cache: Cache,
    config: Config,
) -> tuple[Float[Array, "batch seq dim"], Cache]:
    """What the decoder makes of tokens, given what the cache holds of those before.

    Args:
        params: as `load_params` gives them; leaves plain or compressed.
        tokens: the next tokens of each sequence.
        positions: theirs, counted from 0. The largest int32 for tokens that only fill up a row: no
            other token attends to them, and what comes out for them is of no meaning.
        slot: of the cache, for the first of them; there is room for all of them.
        cache: from `init_cache`, or a former call.
        config: of the decoder, static under `jit`.

    Returns:
        The normed output of the last block, of which `project` makes logits, and the cache with
        these tokens added.
    """
    c = config
    block = Block(c)
    positions, slot = jnp.asarray(positions, jnp.int32), jnp.asarray(slot, jnp.int32)
    slot_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
    cache = cache._replace(positions=slot_positions)
    inputs = Inputs(slot, positions, slot_positions, _rope.rotations(positions, c))

    def block_fn(carry: Any, block_params: Params, layer: Layer) -> Any:
        x, cache = carry
        return block.apply({"params": block_params}, x, cache, inputs, layer), None

    def fetch_block_fn(carry: Any, block_params: Params, layer: Layer) -> Any:
        return block_fn(carry, jax.device_put(block_params, jax.memory.Space.Device), layer)

    x = _table.look_up(params["embed_tokens"], tokens).astype(c.dtype)
    if c.embedding_scale != 1:
        # Rounded, as the models were trained: 55.5 for the square root of 3072.
        x = x * jnp.asarray(c.embedding_scale, c.dtype)
    in_host_memory = params.get("host_layers", {})
    on_device = c.layers - (len(jax.tree.leaves(in_host_memory)[0]) if in_host_memory else 0)

    def layers(begin: int, end: int) -> Layer:
        return Layer(jnp.arange(begin, end, dtype=jnp.int32), jnp.array(c.sliding[begin:end], bool))

    # A cache in the carry is updated in place; as xs and ys, there would be two.
    carry = (x, cache)
    carry, _ = df11_jax.scan_blocks(block_fn, carry, params["layers"], layers(0, on_device))
    if in_host_memory:
        last = layers(on_device, c.layers)
        carry, _ = df11_jax.scan_blocks(fetch_block_fn, carry, in_host_memory, last)
    x, cache = carry
    return rms_norm(x, params["norm"], c), cache


def project(
    params: Params, x: Float[Array, "*batch dim"], config: Config
) -> Float[Array, "*batch vocab"]:
    """Logits of the next tokens.

    Args:
        params: those of `forward`.
        x: what `forward` returns, or the part of it that is of interest.
        config: of the decoder.

    Returns:
        Logits in float32.
    """
    table = params["embed_tokens"] if config.tied else params["lm_head"]
    logits = _table.project(table, x)[..., : config.vocab]
    return softcap(logits, config.logit_softcap)


def block_shapes(config: Config) -> Params:
    """Shapes of the parameters of one block."""

    def init() -> Any:
        x = jnp.zeros((1, 1, config.dim), config.dtype)
        cache = init_cache(config, 1, 1)
        position = cache.positions
        inputs = Inputs(jnp.int32(0), position, position, _rope.rotations(position, config))
        layer = Layer(jnp.int32(0), jnp.bool(False))
        return Block(config).init(jax.random.key(0), x, cache, inputs, layer)

    return jax.eval_shape(init)["params"]


def rms_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, " dim"], config: Config
) -> Float[Array, "*batch dim"]:
    """`x / rms(x) * scale` in float32, returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    scale = scale.astype(jnp.float32) + (1 if config.unit_offset else 0)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + config.norm_eps) * scale).astype(x.dtype)


def _dense(config: Config, features: int, bias: bool, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, name=name)
