"""Choosing tokens from logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from df11_jax._brief import brief

_TINY = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one, or one drawn at random.

    Under `jit`, `temperature` and `top_p` are traced: other values cost no compilation. `prefill`
    and `decode` also take arrays [batch, 1], a value for each row.

    Attributes:
        temperature: logits are divided by it before drawing; None or 0 for the likeliest token.
        top_k: draw from the k likeliest tokens only; None for all. Static.
        top_p: draw only from the likeliest tokens that have, together, this probability (of what
            `top_k` leaves), and the one that reaches it; None for all.
    """

    temperature: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: float | None = None

    def checked(self) -> "Sampling":
        """The same sampling in its simplest form, so that equal ones use one program.

        Raises:
            TypeError: `top_k` is no integer.
            ValueError: a value makes no sense; the message names it.
        """
        if self.top_k is not None:
            check_integers(top_k=self.top_k)
        for name in ("temperature", "top_p"):
            if shape := np.shape(getattr(self, name)):
                raise ValueError(f"{name} has shape {shape}, expected one number for all rows")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected 1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1, or None")
        # A smaller temperature would be a subnormal number in float32, or 0.
        if self.temperature is None or self.temperature < _TINY:
            return Sampling()
        top_p = float(self.top_p) if self.top_p is not None and self.top_p < 1 else None
        return Sampling(float(self.temperature), self.top_k, top_p)


def check_integers(**numbers: Any) -> None:
    """Raises TypeError, with its name, for what is no integer."""
    for name, number in numbers.items():
        if not isinstance(number, (int, np.integer)):
            raise TypeError(f"{name} is {brief(number)}, expected an integer")


def choose(
    logits: Float[Array, "batch vocab"], sampling: Sampling, keys: PRNGKeyArray
) -> Int[Array, " batch"]:
    """One token of each row.

    Args:
        logits: float32.
        sampling: the way to choose them.
        keys: one key for each row, so that a drawn token does not depend on the rest of the batch.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    for name in ("temperature", "top_p"):
        # Those of shape [batch] would belong to tokens, not to rows.
        if (shape := np.shape(getattr(sampling, name)))[-1:] not in ((), (1,)):
            raise ValueError(f"{name} has shape {shape}, expected one number, or [batch, 1]")
    # The largest logit becomes 0, so that dividing by a low temperature overflows to -inf only; and
    # by 0 it is not divided.
    temperature = jnp.maximum(jnp.asarray(sampling.temperature, logits.dtype), _TINY)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return draw(keys, logits).astype(jnp.int32)
    vocab = logits.shape[-1]
    logits, tokens = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    drawn = draw(keys, logits)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
