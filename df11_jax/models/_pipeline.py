"""A pipeline: stages, each of which has some of the blocks, work on pieces one after the other.

A piece goes from stage to stage, and each stage begins with the next piece when it is done with
one: prompts that are read in several pieces keep all stages busy. A single piece, such as the one
token of each row that is read next, has one stage at work, while the others wait.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from df11_jax.models import _collectives
from df11_jax.models._cache import Cache
from df11_jax.models._sharding import STAGES


def run_pieces(
    embed: Callable[[Int[Array, ""]], Float[Array, "batch seq dim"]],
    run: Callable[
        [Int[Array, ""], Float[Array, "batch seq dim"], Cache],
        tuple[Float[Array, "batch seq dim"], Cache],
    ],
    count: int,
    cache: Cache,
    stages: int,
) -> tuple[Float[Array, "batch seq dim"], Cache]:
    """Sends pieces through all blocks.

    Args:
        embed: `embed(i)` is what goes into the first block for piece `i`, computed by all devices
            together.
        run: `run(i, x, cache) -> (x, cache)` applies the blocks that this device has to piece `i`.
        count: the number of pieces, at least 1.
        cache: the cache, of which each stage has the layers of its blocks.
        stages: the number of stages; with more than one, this is called under a mesh that has them.

    Returns:
        What comes out of the last block for the last piece, on all devices, and the cache.
    """
    zero = jnp.int32(0)
    if stages == 1:

        def step(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            return run(i, embed(i), carry[1])

        shape = jax.eval_shape(embed, zero)
        carry = jnp.zeros(shape.shape, shape.dtype), cache
        return jax.lax.fori_loop(0, count, step, carry) if count > 1 else step(zero, carry)
    stage = jax.lax.axis_index(STAGES)
    following = [(i, (i + 1) % stages) for i in range(stages)]

    def work(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        piece = i - stage
        # A loop that ends before it begins where there is nothing to do. XLA would copy a cache
        # that only one branch of a conditional changes.
        busy = ((piece >= 0) & (piece < count)).astype(jnp.int32)
        x, cache = jax.lax.fori_loop(0, busy, lambda _, carry: run(piece, *carry), carry)
        x = jax.lax.ppermute(x, STAGES, following)
        if count > 1:
            begins = (stage == 0) & (i + 1 < count)
            x = jnp.where(begins, embed(jnp.minimum(i + 1, count - 1)), x)
        return x, cache

    x, cache = jax.lax.fori_loop(0, count + stages - 1, work, (embed(zero), cache))
    # The last stage has sent it to the first.
    return _collectives.spread(x, stage == 0, STAGES), cache
