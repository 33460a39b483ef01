"""Embeddings of tokens for each layer, which each block mixes into its output.

All embeddings of a token are a row of one table, of which little more than the rows of the tokens
is decompressed, as of the other embedding.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from df11_jax.models import _collectives
from df11_jax.models._config import Config
from df11_jax.models._layers import RMSNorm, activate, multiply, rms_norm


class TokenInputs(NamedTuple):
    """What a layer gets of some tokens, beside the output of the layer before.

    Attributes:
        embeddings: what the first layer gets.
        rows: the embeddings for this layer.
        scale: the scale of the norm that all layers share.
    """

    embeddings: Float[Array, "batch seq dim"]
    rows: Float[Array, "batch seq layer_dim"]
    scale: Float[Array, " layer_dim"]


class PerLayerInputs(NamedTuple):
    """The same for all layers."""

    embeddings: Float[Array, "batch seq dim"]
    rows: Float[Array, "batch seq layers layer_dim"]
    scale: Float[Array, " layer_dim"]

    def of(self, layer: Int[Array, ""]) -> TokenInputs:
        """The inputs of one layer, by its index among all layers."""
        rows = jax.lax.dynamic_index_in_dim(self.rows, layer, axis=2, keepdims=False)
        return TokenInputs(self.embeddings, rows, self.scale)


def look_up(
    params: dict[str, Any],
    tokens: Int[Array, "batch seq"],
    embeddings: Float[Array, "batch seq dim"],
    config: Config,
) -> PerLayerInputs:
    """What the layers get of some tokens, of which the first layer gets `embeddings`."""
    c = config
    assert c.per_layer is not None
    rows = _collectives.look_up(params["embed_tokens_per_layer"], tokens, c.is_divided)
    rows = rows.astype(c.dtype)
    rows = rows * jnp.asarray(math.sqrt(c.per_layer.dim), c.dtype)
    rows = rows.reshape(*tokens.shape, c.layers, c.per_layer.dim)
    return PerLayerInputs(embeddings, rows, params["per_layer_projection_norm"])


def mix(
    block: nn.Module, x: Float[Array, "batch seq dim"], tokens: TokenInputs
) -> Float[Array, "batch seq dim"]:
    """What a block, in its compact method, adds to its output `x`."""
    c = block.config
    size = tokens.rows.shape[-1]
    (gate,) = multiply(block, x, {"per_layer_input_gate": size}, False)
    (context,) = multiply(block, tokens.embeddings, {"per_layer_model_projection": size}, False)
    context = rms_norm(context * jnp.asarray(c.dim**-0.5, c.dtype), tokens.scale, c)
    mixed = activate(gate, c) * ((context + tokens.rows) * jnp.asarray(2**-0.5, c.dtype))
    (out,) = multiply(block, mixed, {"per_layer_projection": c.dim}, False)
    return RMSNorm(c, name="post_per_layer_input_norm")(out)


def empty_inputs(config: Config) -> TokenInputs | None:
    """The inputs of one token; None if the layers get none."""
    if config.per_layer is None:
        return None
    x, rows = (jnp.zeros((1, 1, size), config.dtype) for size in (config.dim, config.per_layer.dim))
    return TokenInputs(x, rows, rows[0, 0])
