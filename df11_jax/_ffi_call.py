"""Calls of a decoder in traced programs: compiled where it can be, in XLA operations elsewhere."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from df11_jax import _ffi
from df11_jax._promotion import with_promotion


@dataclasses.dataclass(frozen=True)
class DecoderCall:
    """A call of a decoder but for the arrays: all that is static about it.

    Attributes:
        target: the name under which the compiled decoder is registered with XLA.
        vmap_method: the way in which `jax.ffi.ffi_call` maps the compiled decoder.
        attributes: names and values of the compiled decoder's attributes: texts, or words.
        xla: the same decoder in XLA operations, a function of `static` and then the arrays. It
            also tells the types of the results.
        static: the arguments of `xla` that are no arrays.
        falls_back: whether `xla` decodes on platforms without a compiled decoder. If it does not,
            programs for them cannot be lowered.
    """

    target: str
    vmap_method: Literal["expand_dims", "sequential"]
    attributes: tuple[tuple[str, str | tuple[int, ...]], ...]
    xla: Callable[..., PyTree]
    static: tuple[Hashable, ...] = ()
    falls_back: bool = True


def constant(function: Callable[..., PyTree]) -> Callable[..., Any]:
    """The same function, whose derivatives are zero.

    Args:
        function: a function of something static, and then of arrays.
    """
    wrapped = jax.custom_jvp(function, nondiff_argnums=(0,))

    @functools.partial(wrapped.defjvp, symbolic_zeros=True)
    def _jvp(static: Any, primals: tuple[Array, ...], tangents: Any) -> tuple[PyTree, PyTree]:
        # The tangents' zeros are symbolic: as arrays, they would be as large as the weights.
        del tangents
        results = wrapped(static, *primals)
        return results, jax.tree.map(SymbolicZero.from_primal_value, results)

    return wrapped


@constant
def call_decoder(decoder: DecoderCall, *arrays: Array) -> PyTree:
    """Decodes arrays, by what is there for the platform that the program is lowered for."""
    _ffi.warn_if_slow()
    decode = with_promotion(_decode_on_any_platform)
    return decode(decoder, _ffi.platforms(decoder.target), *arrays)


# Under jit even where the caller is not: platform_dependent would otherwise go by the default
# device, and not by where the arrays are.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _decode_on_any_platform(
    decoder: DecoderCall, platforms: tuple[str, ...], *arrays: Array
) -> PyTree:
    xla = functools.partial(decoder.xla, *decoder.static)

    def ffi(*arrays: Array) -> PyTree:
        out = result_types(xla, *arrays)
        call = jax.ffi.ffi_call(decoder.target, out, vmap_method=decoder.vmap_method)
        attributes = {
            name: value if isinstance(value, str) else np.array(value, np.uint32)
            for name, value in decoder.attributes
        }
        return call(*arrays, **attributes)

    compiled = dict.fromkeys(platforms, ffi)
    default = xla if decoder.falls_back else None
    return jax.lax.platform_dependent(*arrays, **compiled, default=default)


def result_types(function: Callable[..., PyTree], *arrays: Array) -> PyTree:
    """The types of a function's results, for `jax.ffi.ffi_call`.

    Not only shapes: in a shard_map, the types also say along which axes results differ.
    """
    out = jax.eval_shape(function, *arrays)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or mesh.are_all_axes_manual:
        return out
    # Where only some axes are manual, such a type is none without the mesh that they are of.
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda one: one if one.sharding is not None else one.update(sharding=here), out
    )
