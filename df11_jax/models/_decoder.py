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

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt
from numpy.typing import DTypeLike

import df11_jax
from df11_jax.models import _rope, _table
from df11_jax.models._config import Config

# The position of empty slots, and of tokens that fill up rows: after all others.
NOWHERE = np.iinfo(np.int32).max

# Of attention scores at a time, and of keys and values that XLA copies out of the cache: for many
# or long sequences they would else be most of the memory.
PART_BYTES = 64 * 2**20

Params = dict[str, Any]


class Cache(NamedTuple):
    """What attention looks at: keys (already rotated) and values of all layers.

    They are in slots, which are filled from the first to the last, those of all rows of a batch at
    the same time. Rows may leave slots out, so each slot has its position.

    Sliding layers have as many slots as the others, which they could do without.

    Keys and values are kept as bit patterns: to change a part of a bfloat16 array, XLA on a CPU
    writes all of it anew.
    """

    keys: UInt[Array, "layers batch kv_heads slots head_dim"]
    values: UInt[Array, "layers batch kv_heads slots head_dim"]
    positions: Int[Array, "batch slots"]


class Inputs(NamedTuple):
    """What blocks get beside activations, the same for all.

    Attributes:
        slot: of the first token.
        positions: of the tokens.
        slot_positions: of all slots, those of the tokens included.
        rotations: for full and for sliding layers.
    """

    slot: Int[Array, ""]
    positions: Int[Array, "batch seq"]
    slot_positions: Int[Array, "batch slots"]
    rotations: _rope.Rotation


class Layer(NamedTuple):
    """Which block it is.

    Attributes:
        number: counted from 0.
        sliding: whether it attends to the last `window` positions only.
    """

    number: Int[Array, ""]
    sliding: Bool[Array, ""]


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
            keys=_write(cache.keys, key, layer, inputs.slot),
            values=_write(cache.values, value, layer, inputs.slot),
        )
        mixed = _attend(query, cache, inputs, layer, c)
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


def init_cache(config: Config, batch: int, slots: int) -> Cache:
    """An empty cache.

    Args:
        config: of the decoder.
        batch: how many sequences.
        slots: for how many tokens of each.
    """
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    bits = _bits(config.dtype)
    return Cache(
        jnp.zeros(shape, bits),
        jnp.zeros(shape, bits),
        jnp.full((batch, slots), NOWHERE, jnp.int32),
    )


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


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`cap * tanh(x / cap)`, or `x` if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _bits(dtype: DTypeLike) -> np.dtype:
    """The unsigned integers that are as large."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _write(
    stack: UInt[Array, "layers batch kv_heads slots head_dim"],
    new: Float[Array, "batch seq kv_heads head_dim"],
    layer: Layer,
    slot: Int[Array, ""],
) -> UInt[Array, "layers batch kv_heads slots head_dim"]:
    """Puts keys or values of some tokens into their slots."""
    bits = jax.lax.bitcast_convert_type(jnp.moveaxis(new, 1, 2), stack.dtype)
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(stack, bits[None], (layer.number, zero, zero, slot, zero))


def _read(
    stack: UInt[Array, "layers batch kv_heads slots head_dim"],
    layer: Layer,
    row: Int[Array, ""],
    head: Int[Array, ""],
    counts: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "pairs slots head_dim"]:
    """Keys or values of some rows and heads."""
    start = (layer.number, row, head, jnp.int32(0), jnp.int32(0))
    bits = jax.lax.dynamic_slice(stack, start, (1, *counts, *stack.shape[3:]))
    return jax.lax.bitcast_convert_type(bits.reshape(-1, *stack.shape[3:]), dtype)


def _attend(
    query: Float[Array, "batch seq heads head_dim"],
    cache: Cache,
    inputs: Inputs,
    layer: Layer,
    config: Config,
) -> Float[Array, "batch seq heads head_dim"]:
    """Means of the values, weighted by how well their keys fit the queries."""
    c = config
    batch, seq = inputs.positions.shape
    slots = cache.positions.shape[1]
    # Consecutive query heads share a key-value head: give them an axis of their own.
    query = jnp.moveaxis(query.reshape(batch, seq, c.kv_heads, -1, c.head_dim), 1, 2)

    def attend_part(query: Array, row: Array, head: Array) -> Array:
        rows, heads, _, shared, _ = query.shape
        keys = _read(cache.keys, layer, row, head, (rows, heads), c.dtype)
        values = _read(cache.values, layer, row, head, (rows, heads), c.dtype)
        positions, slot_positions = (
            jax.lax.dynamic_slice_in_dim(places, row, rows)
            for places in (inputs.positions, inputs.slot_positions)
        )

        def attend_tokens(query: Array, _row: Array, _head: Array, token: Array) -> Array:
            tokens = query.shape[2]
            # Not mapped over the tokens: of one sequence, XLA for GPUs would then keep the keys of
            # all layers a second time, transposed.
            flat = query.reshape(rows * heads, tokens * shared, c.head_dim)
            scores = jnp.einsum("nqd,ntd->nqt", flat, keys, preferred_element_type=jnp.float32)
            scores = softcap(scores * c.attention_scale, c.attention_softcap)
            places = jax.lax.dynamic_slice_in_dim(positions, token, tokens, axis=1)
            ago = places[..., None] - slot_positions[:, None]
            visible = ago >= 0
            if any(c.sliding):
                visible &= ~layer.sliding | (ago < c.window)
            scores = scores.reshape(rows, heads, tokens, shared, slots)
            scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores).astype(c.dtype)
            weights = weights.reshape(rows * heads, tokens * shared, slots)
            return jnp.einsum("nqt,ntd->nqd", weights, values).reshape(query.shape)

        a_token = 4 * rows * heads * shared * slots
        return _in_parts(attend_tokens, query, (rows, heads, PART_BYTES // a_token))

    a_head = 2 * slots * c.head_dim * cache.keys.dtype.itemsize
    a_row = a_head * c.kv_heads
    mixed = _in_parts(attend_part, query, (PART_BYTES // a_row, PART_BYTES // a_head))
    return jnp.moveaxis(mixed, 2, 1).reshape(batch, seq, -1, c.head_dim)


def _in_parts(
    function: Callable[..., Array],
    array: Array,
    most: tuple[int, ...],
    starts: tuple[Array, ...] = (),
) -> Array:
    """What a function makes of an array, part by part.

    Args:
        function: gets a part, and along each axis of `most` where it starts; the result has the
            shape and dtype of the part, and does not depend on how the array is divided.
        array: to be divided.
        most: how long parts are along the first axes, at most; less than 1 is taken for 1.
        starts: along the axes that are done with.
    """
    axis = len(starts)
    if axis == len(most):
        return function(array, *starts)
    size = array.shape[axis]
    parts = -(-size // max(1, most[axis]))
    if parts == 1:
        return _in_parts(function, array, most, (*starts, jnp.int32(0)))
    length = -(-size // parts)

    def do_part(i: Array, out: Array) -> Array:
        # All parts are equally long. What two of them have in common comes out the same.
        start = jnp.minimum(i * length, size - length)
        part = jax.lax.dynamic_slice_in_dim(array, start, length, axis)
        new = _in_parts(function, part, most, (*starts, start))
        return jax.lax.dynamic_update_slice_in_dim(out, new, start, axis)

    return jax.lax.fori_loop(0, parts, do_part, jnp.zeros_like(array))


def _dense(config: Config, features: int, bias: bool, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, name=name)
