"""Decompression inside traced programs.

All tensors that are wanted together are decoded by one FFI call, which gets whole stacks and the
index of the slice: handing it slices would make XLA copy them first.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, BFloat16, Int32, PyTree

from df11_jax import _ffi, _layout, _xla_decoder
from df11_jax._array import DF11Array, is_df11
from df11_jax._ffi_call import DecoderCall, call_decoder

Arrays = TypeVar("Arrays", bound=PyTree)

# For `jax.export.export(..., disabled_checks=EXPORT_SAFETY_CHECKS)`: the FFI call is stable, but
# whoever runs the exported program must have imported df11_jax.
EXPORT_SAFETY_CHECKS = tuple(
    export.DisabledSafetyCheck.custom_call(target)
    for target in (_ffi.DECODE_TARGET, _ffi.PUBLISHED_DECODE_TARGET)
)


def decompress(a: DF11Array) -> BFloat16[Array, "..."]:
    """Decompresses one tensor, or a whole stack.

    It works eagerly and inside `jit`, `vmap`, `scan`, `grad`, `checkpoint`, `shard_map` and
    `export`. Its derivative is zero: the weights are constants.

    Args:
        a: the compressed tensor.

    Returns:
        The bfloat16 tensor of shape `a.shape`, bit for bit what was compressed.

    Raises:
        TypeError: `a` is not a `DF11Array`.
        ValueError: its arrays do not fit each other.
        jax.errors.JaxRuntimeError: when the program runs, if the payload is corrupt. (Where there
            is no compiled decoder, corrupt weights become NaNs instead.)
    """
    if not isinstance(a, DF11Array):
        raise TypeError(f"decompress takes a DF11Array, got {type(a).__name__}")
    return _decode_stacks([a], ["tensor"])[0]


def decompress_params(params: PyTree) -> PyTree:
    """Decompresses all compressed leaves of a pytree.

    Leaves with the same stack axes (all leaves of a transformer block, say) are decoded together,
    by one call.

    Args:
        params: any pytree.

    Returns:
        The same with an array in the place of each `DF11Array`; all other leaves are untouched.

    Raises:
        ValueError: arrays of a leaf do not fit each other; the message has the leaf's path.
    """
    with_paths, treedef = jax.tree.flatten_with_path(params, is_leaf=is_df11)
    leaves = [leaf for _, leaf in with_paths]
    by_stack: dict[tuple[int, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        if is_df11(leaf):
            by_stack.setdefault(leaf.stack_shape, []).append(i)
    for members in by_stack.values():
        names = [path_name(with_paths[i][0]) for i in members]
        weights = _decode_stacks([leaves[i] for i in members], names)
        for i, weight in zip(members, weights, strict=True):
            leaves[i] = weight
    return jax.tree.unflatten(treedef, leaves)


def after(params: PyTree, inputs: PyTree) -> PyTree:
    """The same weights, which are decompressed only once `inputs` have been computed.

    XLA moves a decompression whose operands do not change out of a loop, and would hold all that
    it decompresses. With inputs that change in the loop, such as the last token, it cannot.

    Args:
        params: any pytree; its `DF11Array` leaves are replaced.
        inputs: pytree of arrays; what is not an array is ignored.

    Returns:
        The same pytree. It has a meaning inside of a jitted function only.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_df11)
    # The decoder reads the header of a tensor, which is small, before anything else.
    headers = iter(_tie([leaf.header for leaf in leaves if is_df11(leaf)], inputs))
    return jax.tree.unflatten(
        treedef,
        [
            dataclasses.replace(leaf, header=next(headers)) if is_df11(leaf) else leaf
            for leaf in leaves
        ],
    )


def decode_slices(
    arrays: Sequence[DF11Array],
    index: Int32[Array, "*batch"],
    *,
    names: Sequence[str] | None = None,
    after: PyTree = None,
) -> list[BFloat16[Array, "*batch_and_slice"]]:
    """Decodes slices of compressed stacks, of all of them in one call.

    Args:
        arrays: stacks with the same number of slices; several stack axes count as one.
        index: which slice, or slices; it is clamped to the stack.
        names: what to call the tensors in error messages.
        after: arrays to be computed before decoding starts. In a loop, give it what the loop
            carries: XLA would otherwise move decodes whose operands do not change to the front of
            the loop, or do several at once, and hold all that they decode.

    Returns:
        For each stack the decoded slices, of shape `index.shape + slice_shape`.

    Raises:
        ValueError: the arrays of a stack do not fit each other, or the stacks differ in length.
    """
    if not arrays:
        return []
    names = tuple(names) if names is not None else tuple(f"tensor {i}" for i in range(len(arrays)))
    lengths = []
    for array, name in zip(arrays, names, strict=True):
        stack = _layout.check_payload(array.payload, array.slice_shape, name)
        if any(_is_split(leaf) for leaf in array.payload):
            raise ValueError(
                f"{name}: is sharded over explicit axes of a mesh; decompress it in a "
                "jax.shard_map, or make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
            )
        lengths.append(math.prod(stack))
        if lengths[-1] != lengths[0]:
            raise ValueError(
                f"{name}: a stack of {lengths[-1]} slices, expected {lengths[0]} like {names[0]}"
            )
    index = jnp.asarray(index, jnp.int32)
    slice_shapes = tuple(array.slice_shape for array in arrays)
    if lengths[0] == 0:
        return [jnp.zeros(index.shape + shape, jnp.bfloat16) for shape in slice_shapes]

    ones = (1,) * index.ndim
    payloads = tuple(
        jnp.reshape(leaf, (*ones, lengths[0], leaf.shape[-1]))
        for array in arrays
        for leaf in array.payload
    )
    decoder = DecoderCall(
        _ffi.DECODE_TARGET,
        "expand_dims",
        attributes=(("names", "\n".join(names)),),
        xla=_decode_by_xla,
        static=(slice_shapes,),
    )
    return list(call_decoder(decoder, _tie(index, after), *payloads))


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path, as messages write it: `blocks/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "tensor"


def _decode_stacks(arrays: Sequence[DF11Array], names: Sequence[str]) -> list[Array]:
    """Decodes all slices of stacks with the same axes."""
    stack = arrays[0].stack_shape
    if not stack:
        return decode_slices(arrays, jnp.int32(0), names=names)
    weights = decode_slices(arrays, jnp.arange(math.prod(stack), dtype=jnp.int32), names=names)
    return [w.reshape(stack + a.slice_shape) for w, a in zip(weights, arrays, strict=True)]


def _tie(arrays: Arrays, inputs: PyTree) -> Arrays:
    """The same arrays, which XLA believes to depend on `inputs`."""
    # Without stop_gradient, the barrier would give the arrays tangents, as arrays of zeros.
    leaves = [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(inputs) if _is_number(leaf)]
    return jax.lax.optimization_barrier((arrays, leaves))[0] if leaves else arrays


def _is_split(leaf: Any) -> bool:
    """Whether the type says that an array is sharded, which its decoding cannot go along with."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _decode_by_xla(
    slice_shapes: tuple[tuple[int, ...], ...], index: Array, *payloads: Array
) -> tuple[Array, ...]:
    # Index and headers may be tied to what is computed first: so be all that is read.
    index, payloads = jax.lax.optimization_barrier((index, payloads))
    each = len(_layout.PAYLOAD)
    return tuple(
        _xla_decoder.decode(index, *payloads[each * i : each * (i + 1)], slice_shape=shape)
        for i, shape in enumerate(slice_shapes)
    )
