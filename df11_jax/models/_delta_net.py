"""The linear layers of hybrid models: projections around the gated delta rule."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
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
        keys, values = rule.key_heads * rule.key_dim, rule.value_heads * rule.value_dim
        widths, heads = {"q": keys, "k": keys, "v": values}, rule.value_heads
        features = {f"in_proj_{part}": width for part, width in widths.items()}
        features |= {"in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
        *parts, gate, rate, decay = multiply(self, x, features, False)
        taps = [Taps(rule.taps, width, name=f"conv1d_{part}")() for part, width in widths.items()]
        mixed, states = _delta_rule.convolve(
            _join(parts, rule), _join(taps, rule), states, layer, steps
        )
        query, key, value = jnp.split(
            mixed.reshape(*x.shape[:2], rule.key_heads, -1),
            [rule.key_dim, 2 * rule.key_dim],
            axis=-1,
        )
        value = value.reshape(*x.shape[:2], heads, rule.value_dim)
        zeros = nn.initializers.zeros
        pace = -jnp.exp(self.param("A_log", zeros, (heads,)).astype(jnp.float32))
        bias = self.param("dt_bias", zeros, (heads,)).astype(jnp.float32)
        decay = pace * nn.softplus(decay.astype(jnp.float32) + bias)
        rate = nn.sigmoid(rate.astype(jnp.float32))
        out, states = _delta_rule.apply_rule(query, key, value, decay, rate, states, layer, steps)
        # In all models with these layers, this norm has no offset.
        out = RMSNorm(dataclasses.replace(c, unit_offset=False), name="norm")(out)
        out = (out * nn.silu(gate.reshape(out.shape).astype(jnp.float32))).astype(x.dtype)
        (out,) = multiply(self, out.reshape(*x.shape[:2], -1), {"out_proj": c.dim}, False, c.axis)
        return out, states


def _join(parts: Sequence[Float[Array, "*batch _"]], rule: DeltaRule) -> Float[Array, "*batch _"]:
    """The channels of queries, keys and values, those of each key head together.

    So devices, each of which has some of the heads, divide the states of one.
    """
    heads = [part.reshape(*part.shape[:-1], rule.key_heads, -1) for part in parts]
    joined = jnp.concatenate(heads, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


class Taps(nn.Module):
    """The weights of a convolution of each channel by itself."""

    taps: int
    channels: int

    @nn.compact
    def __call__(self) -> Float[Array, "taps 1 channels"]:
        """The weights."""
        return self.param("taps", nn.initializers.zeros, (self.taps, 1, self.channels))
