"""The decoder's call for slices of stacks that lie where the program runs, as one device sees them.

All tensors that are wanted together are decoded by one FFI call, which gets whole stacks and the
index of the slice: handing it slices would make XLA copy them first.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int32

from df11_jax import _ffi, _layout, _parts, _xla_decoder
from df11_jax._ffi_call import DecoderCall, call_decoder
from df11_jax._layout import Layout
from df11_jax._promotion import with_promotion


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is to be decoded, but for the arrays.

    Attributes:
        layouts: the layout of the slices of each stack.
        names: the name of each, for messages.
        wanted: the slices of an index, the bands of it, or all slices.
    """

    layouts: tuple[Layout, ...]
    names: tuple[str, ...]
    wanted: Literal["slices", "bands", "all"]

    def shape_of(self, layout: Layout) -> tuple[int, ...]:
        """The shape of what is decoded at an index, or of one part of it."""
        band = layout.view.band
        return (band.n, band.k) if self.wanted == "bands" else layout.part_shape


@with_promotion
def decode_local(
    decoding: Decoding, index: Int32[Array, "*batch"], *payloads: Array
) -> list[BFloat16[Array, "..."]]:
    """Decodes slices of stacks.

    Args:
        decoding: what is to be decoded.
        index: the indices of what is wanted, unless it is all; see `decode_slices`.
        payloads: the five arrays of each stack, one stack after the other. Of a divided one, they
            may have some of the parts.

    Returns:
        The slices, or bands, of each stack, of the shape `index.shape + slice_shape`, or all
        slices, `stack_shape + slice_shape`.
    """
    each = len(_layout.PAYLOAD)
    stacks = [payloads[i : i + each] for i in range(0, len(payloads), each)]
    leading = [
        _parts.split_leading(stack[0].shape, layout)
        for stack, layout in zip(stacks, decoding.layouts, strict=True)
    ]
    # A launch has one index, of parts where slices are divided: others have launches of their own.
    kinds = [(stack_shape, math.prod(parts)) for stack_shape, parts in leading]
    weights: dict[int, Array] = {}
    for stack_shape, count in dict.fromkeys(kinds):
        members = [i for i, kind in enumerate(kinds) if kind == (stack_shape, count)]
        length = math.prod(stack_shape)
        if decoding.wanted == "all":
            index = jnp.arange(length, dtype=jnp.int32).reshape(stack_shape)
        decoded = _decode_parts(
            [stacks[i] for i in members],
            dataclasses.replace(
                decoding,
                layouts=tuple(decoding.layouts[i] for i in members),
                names=tuple(decoding.names[i] for i in members),
            ),
            index,
            length,
            count,
        )
        for i, array in zip(members, decoded, strict=True):
            parts = leading[i][1]
            array = array.reshape(*index.shape, *parts, *decoding.shape_of(decoding.layouts[i]))
            weights[i] = _parts.join(array, len(parts))
    return [weights[i] for i in range(len(stacks))]


def _decode_parts(
    stacks: Sequence[Sequence[Array]],
    decoding: Decoding,
    index: Int32[Array, "*batch"],
    length: int,
    count: int,
) -> list[BFloat16[Array, "..."]]:
    """Decodes slices of which there are as many parts, by one call.

    Args:
        stacks: the five arrays of each stack.
        decoding: what is to be decoded of these.
        index: the indices of it.
        length: the number of slices in a stack.
        count: the number of parts of a slice.
    """
    if count > 1:
        first = jnp.clip(index, 0, length - 1) * count
        parts = first[..., None] + jnp.arange(count, dtype=jnp.int32)
        index = jnp.where(index[..., None] == -1, -1, parts)
    ones = (1,) * index.ndim
    payloads = tuple(
        jnp.reshape(leaf, (*ones, length * count, leaf.shape[-1]))
        for stack in stacks
        for leaf in stack
    )
    headers = tuple(
        word for layout in decoding.layouts for word in _layout.pack_header(layout).tolist()
    )
    decoder = DecoderCall(
        _ffi.DECODE_TARGET,
        "expand_dims",
        attributes=(("names", "\n".join(decoding.names)), ("headers", headers)),
        xla=_decode_by_xla,
        static=(dataclasses.replace(decoding, names=()),),
    )
    return list(call_decoder(decoder, index, *payloads))


def _decode_by_xla(decoding: Decoding, index: Array, *payloads: Array) -> tuple[Array, ...]:
    # Index and headers may be tied to other values, and all arrays are read after these, too.
    index, payloads = jax.lax.optimization_barrier((index, payloads))
    each = len(_layout.PAYLOAD)
    return tuple(
        _xla_decoder.decode(
            index,
            *payloads[each * i : each * (i + 1)],
            layout=layout,
            bands=decoding.wanted == "bands",
        )
        for i, layout in enumerate(decoding.layouts)
    )
