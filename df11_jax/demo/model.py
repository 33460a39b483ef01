"""A small byte-level Llama-style transformer whose weights may be plain or compressed.

Parameters are one nested dictionary:

    embedding   BFloat16[Array, "vocab dim"], also the output head
    layers/...  one array per tensor of a block, stacked: leading axis `layers`;
                kernels are [layers, in, out]
    final_norm  BFloat16[Array, "dim"]

`forward` is written once. Each leaf of that dictionary may be a plain array or a `DF11Array`;
nothing below asks which.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import df11_jax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are those of the bundled checkpoint."""

    vocab: int = 256
    layers: int = 8
    dim: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 512
    rope_base: float = 10_000.0
    dtype: Any = jnp.bfloat16  # of activations and of the key-value cache


class Cache(NamedTuple):
    """Keys (already rotated) and values of one block, for every position that fits.

    `init_cache` makes it for the whole model: a leading `layers` axis is added to both.
    """

    keys: Float[Array, "batch length kv_heads head_dim"]
    values: Float[Array, "batch length kv_heads head_dim"]


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, computed in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Norms each vector of the last axis."""
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:]))


class Attention(nn.Module):
    """Causal grouped-query attention over a cache of static length."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        cache: Cache,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """Attends from positions `start, start + 1, ...`; returns the cache with them written."""
        c = self.config
        batch, seq, _ = x.shape
        positions = start + jnp.arange(seq)

        query = _dense(c, c.heads * c.head_dim, "query")(x).reshape(batch, seq, -1, c.head_dim)
        key = _dense(c, c.kv_heads * c.head_dim, "key")(x).reshape(batch, seq, -1, c.head_dim)
        value = _dense(c, c.kv_heads * c.head_dim, "value")(x).reshape(batch, seq, -1, c.head_dim)
        query = rotate(query, positions, c.rope_base)
        key = rotate(key, positions, c.rope_base)

        at = (0, start, 0, 0)
        cache = Cache(
            jax.lax.dynamic_update_slice(cache.keys, key.astype(cache.keys.dtype), at),
            jax.lax.dynamic_update_slice(cache.values, value.astype(cache.values.dtype), at),
        )

        # Consecutive query heads share a key-value head: give them an axis of their own.
        query = query.reshape(batch, seq, c.kv_heads, -1, c.head_dim)
        scores = jnp.einsum("bsngd,btnd->bngst", query, cache.keys).astype(jnp.float32)
        visible = jnp.arange(cache.keys.shape[1]) <= positions[:, None]
        scores = jnp.where(visible, scores * c.head_dim**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(c.dtype)
        mixed = jnp.einsum("bngst,btnd->bsngd", weights, cache.values)
        return _dense(c, c.dim, "output")(mixed.reshape(batch, seq, -1)), cache


class SwiGLU(nn.Module):
    """`(silu(x gate) * (x up)) down`."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        """Maps each position by itself."""
        c = self.config
        hidden = nn.silu(_dense(c, c.hidden, "gate")(x)) * _dense(c, c.hidden, "up")(x)
        return _dense(c, c.dim, "down")(hidden)


class Block(nn.Module):
    """One transformer block: attention, then SwiGLU, each normed first and added back."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        cache: Cache,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "batch seq dim"], Cache]:
        """Advances `x`, at positions `start, start + 1, ...`, and this block's cache."""
        attended, cache = Attention(self.config, name="attention")(
            RMSNorm(name="attention_norm")(x), cache, start
        )
        x = x + attended
        x = x + SwiGLU(self.config, name="mlp")(RMSNorm(name="mlp_norm")(x))
        return x, cache


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    cache: Cache,
    start: Int[Array, ""] | int,
    config: Config,
) -> tuple[Float[Array, "batch seq vocab"], Cache]:
    """Logits for `tokens` at positions `start, start + 1, ...`, given what the cache holds.

    Args:
        params: the dictionary described at the top; leaves plain or compressed.
        tokens: the next bytes of each sequence.
        cache: keys and values of the positions before `start`, from `init_cache` or a former call.
        start: the number of positions already in the cache.
        config: sizes, static under `jit`.

    Returns:
        The float32 logits after each token, and the cache with these tokens added.
    """
    outer = df11_jax.decompress_params({k: v for k, v in params.items() if k != "layers"})
    embedding = outer["embedding"].astype(config.dtype)
    block = Block(config)

    def block_fn(x: Array, block_params: Params, layer_cache: Cache) -> Any:
        return block.apply({"params": block_params}, x, layer_cache, start)

    x = embedding[tokens]
    x, cache = df11_jax.scan_blocks(block_fn, x, params["layers"], xs=cache)
    x = rms_norm(x, outer["final_norm"])
    logits = jnp.einsum("bsd,vd->bsv", x, embedding, preferred_element_type=jnp.float32)
    return logits, cache


def init_params(key: PRNGKeyArray, config: Config) -> Params:
    """Fresh float32 parameters; the blocks are initialised together, one key for each."""
    embedding_key, layers_key = jax.random.split(key)
    x = jnp.zeros((1, 1, config.dim), config.dtype)
    cache = jax.tree.map(lambda a: a[0], init_cache(config, batch=1, length=1))

    def init_block(block_key: PRNGKeyArray) -> Params:
        return Block(config).init(block_key, x, cache, 0)["params"]

    return {
        "embedding": 0.02 * jax.random.normal(embedding_key, (config.vocab, config.dim)),
        "layers": jax.vmap(init_block)(jax.random.split(layers_key, config.layers)),
        "final_norm": jnp.ones(config.dim),
    }


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """An empty cache of `length` positions for all layers: leaves lead with a `layers` axis."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def rms_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, " dim"]
) -> Float[Array, "*batch dim"]:
    """`x / rms(x) * scale` in float32, returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(
    x: Float[Array, "batch seq heads head_dim"], positions: Int[Array, " seq"], base: float
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary embedding: turns the pair (i, i + half) by position * base^(-i / half)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half) / half)
    angles = positions[:, None, None] * frequencies  # [seq, 1, half]: the same for every head
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _dense(config: Config, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=config.dtype, name=name)
