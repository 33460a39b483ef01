"""The linear layers of hybrid models: projections around the gated delta rule."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from df11_jax.models import _delta_rule
from df11_jax.models._config import Config, DeltaRule
from df11_jax.models._delta_rule import States, Steps
from df11_jax.models._layers import RMSNorm, multiply


class GatedDeltaNet(nn.Module):
    """A convolution and the gated delta rule; see `_delta_rule`."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq dim"], states: States, steps: Steps, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "batch seq dim"], States]:
        """Reads the tokens that `steps` tells; returns the states after them."""
        c, rule = self.config, self.config.delta_rule
        assert rule is not None
        size, heads = rule.value_heads * rule.value_dim, (rule.value_heads,)
        features = {
            "in_proj_qkv": rule.channels,
            "in_proj_z": size,
            "in_proj_b": rule.value_heads,
            "in_proj_a": rule.value_heads,
        }
        mixed, gate, rate, decay = multiply(self, x, features, False)
        taps = Taps(rule, name="conv1d")()
        mixed, states = _delta_rule.convolve(mixed, taps, states, layer, steps)
        ends = rule.key_heads * rule.key_dim * np.arange(1, 3)
        query, key, value = (
            flat.reshape(*x.shape[:2], -1, width)
            for flat, width in zip(
                jnp.split(mixed, ends, axis=-1),
                (rule.key_dim, rule.key_dim, rule.value_dim),
                strict=True,
            )
        )
        zeros = nn.initializers.zeros
        pace = -jnp.exp(self.param("A_log", zeros, heads).astype(jnp.float32))
        bias = self.param("dt_bias", zeros, heads).astype(jnp.float32)
        decay = pace * nn.softplus(decay.astype(jnp.float32) + bias)
        rate = nn.sigmoid(rate.astype(jnp.float32))
        out, states = _delta_rule.apply_rule(
            query, key, value, decay, rate, states, layer, steps
        )
        plain = dataclasses.replace(c, unit_offset=False)
        out = RMSNorm(plain, name="norm")(out) * nn.silu(
            gate.reshape(out.shape).astype(jnp.float32)
        )
        (out,) = multiply(self, out.astype(x.dtype).reshape(*x.shape[:2], -1), {"out_proj": c.dim}, False)
        return out, states


class Taps(nn.Module):
    """The weights of a convolution of each channel by itself."""

    rule: DeltaRule

    @nn.compact
    def __call__(self) -> Float[Array, "taps 1 channels"]:
        """The weights."""
        shape = (self.rule.taps, 1, self.rule.channels)
        return self.param("taps", nn.initializers.zeros, shape)
