"""Layers that blocks are made of: norms, activations, and products with kernels."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from df11_jax._array import DF11Slice
from df11_jax._product import dot
from df11_jax.models import _collectives
from df11_jax.models._config import Config


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, computed in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Norms each vector of the last axis."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x, scale, self.config)


def activate(x: Float[Array, "..."], config: Config) -> Float[Array, "..."]:
    """The activation of a gate."""
    return nn.silu(x) if config.activation == "silu" else nn.gelu(x, approximate=True)


def rms_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, " dim"], config: Config
) -> Float[Array, "*batch dim"]:
    """`x / rms(x) * scale` in float32, returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    scale = scale.astype(jnp.float32) + (1 if config.unit_offset else 0)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + config.norm_eps) * scale).astype(x.dtype)


def multiply(
    module: nn.Module,
    x: Float[Array, "batch seq in_features"],
    features: Mapping[str, int],
    bias: bool,
    axis: str | None = None,
) -> list[Float[Array, "batch seq _"]]:
    """The outputs of dense layers of a module for the same `x`.

    Args:
        module: the module, in its compact method.
        x: the inputs.
        features: the names of the layers, and the numbers of their outputs.
        bias: whether they have biases.
        axis: the axis of a mesh of devices, if each of them has some of the inputs; None otherwise.
    """
    dtype = module.config.dtype
    weights: dict[str, dict[str, Any]] = {
        name: module.get_variable("params", name, {}) for name in features
    }
    # Kernels that are still compressed are multiplied by one call.
    slices = {
        name: layer["kernel"]
        for name, layer in weights.items()
        if isinstance(layer.get("kernel"), DF11Slice)
    }
    # What devices have of a sum is added before it is rounded.
    wide = None if axis is None else jnp.float32
    terms = dot(x, list(slices.values()), preferred_element_type=wide)
    products = {
        name: _collectives.sum_up(term, axis).astype(x.dtype)
        for name, term in zip(slices, terms, strict=True)
    }
    dot_general = _collectives.summing_dot_general(axis)
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
