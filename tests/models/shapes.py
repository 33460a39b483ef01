"""Shapes of parameters of any size, to compile programs without them."""

import re

import jax
import jax.numpy as jnp

from df11_jax import DF11Array, _layout
from df11_jax.models import Config, Params
from df11_jax.models._decoder import block_shapes
from df11_jax.models._table import table_shape

# Of normally distributed weights; trained ones have some more.
EXPONENT_BITS = 2.63


def block_nbytes(config: Config) -> int:
    """Bytes of the weights of one block, not compressed."""
    return sum(2 * leaf.size for leaf in jax.tree.leaves(block_shapes(config)))


def cache_copies(program: jax.stages.Compiled) -> list[str]:
    """The whole caches that a program copies, but for the zeros that they begin with."""
    copies = re.findall(r"= u16\[(\d+),(\d+,\d+,\d+,\d+)\]\S* copy\((%[\w.\-]+)", program.as_text())
    return [
        f"{layers},{rest}"
        for layers, rest, operand in copies
        if layers != "1" and "broadcast" not in operand
    ]


def param_shapes(
    config: Config, *, compress: bool, sharding: jax.sharding.Sharding | None = None
) -> Params:
    """Shapes of what `load_params` returns, with exponents as normal weights have them."""

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def leaf(shape):
        if not compress or len(shape) < 3:
            return array(shape, jnp.bfloat16)
        length, *slice_shape = shape
        view = _layout.make_view(slice_shape)
        words = (
            _layout.HEADER_WORDS,
            _layout.CODEBOOK_WORDS,
            view.chunks + 1,
            4 * round(view.size * EXPONENT_BITS / 128),
            view.sign_mantissa_words,
        )
        payload = [array((length, count), jnp.uint32) for count in words]
        return DF11Array(*payload, slice_shape=tuple(slice_shape))

    table = leaf(table_shape(config.vocab, config.dim))
    layers = jax.tree.map(lambda x: leaf((config.layers, *x.shape)), block_shapes(config))
    params = {"embed_tokens": table, "layers": layers, "norm": leaf((config.dim,))}
    return params if config.tied else params | {"lm_head": table}
