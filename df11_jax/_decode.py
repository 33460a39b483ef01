"""Decompression of tensors and pytrees, also inside of traced programs."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array, PyTree

from df11_jax import _ffi
from df11_jax._array import DF11Array, DF11Slice, is_df11, is_df11_or_slice
from df11_jax._identity import identity
from df11_jax._leaves import raw_value
from df11_jax._slices import decode_slices, decode_stacks, tie

# For `jax.export.export(..., disabled_checks=EXPORT_SAFETY_CHECKS)`. The FFI call is stable, but a
# process that runs the exported program must have imported df11_jax, which registers the handlers.
EXPORT_SAFETY_CHECKS = tuple(
    export.DisabledSafetyCheck.custom_call(target)
    for target in (_ffi.DECODE_TARGET, _ffi.PUBLISHED_DECODE_TARGET, _ffi.PRODUCT_TARGET)
)


def decompress(a: DF11Array | DF11Slice | Array) -> Array:
    """Decompresses one tensor, a whole stack, or slices of a stack.

    It works eagerly and inside `jit`, `vmap`, `scan`, `grad`, `checkpoint`, `shard_map` and
    `export`. Its derivative is zero: the weights are constants.

    Args:
        a: the compressed tensor, or an array of JAX or numpy; also an nnx variable that holds it.

    Returns:
        The bfloat16 tensor of shape `a.shape`, bit for bit what was compressed. An array is
        returned as it is.

    Raises:
        TypeError: `a` is neither, or holds the shapes of arrays in place of arrays.
        ValueError: its arrays do not fit each other.
        jax.errors.JaxRuntimeError: the payload is corrupt; this is raised when the program runs.
            Depending on when JAX notices, a ValueError instead; both begin with DATA_LOSS. (On
            GPUs, and where there is no compiled decoder, corrupt weights become NaNs.)
    """
    a = raw_value(a)
    if isinstance(a, DF11Slice):
        return a.__jax_array__()
    if isinstance(a, (jax.Array, np.ndarray)):
        return a
    if not isinstance(a, DF11Array):
        raise TypeError(
            f"decompress takes a DF11Array or an array, got {type(a).__name__}; "
            "decompress_params takes pytrees of them"
        )
    return decode_stacks([a], ["tensor"])[0]


def decompress_params(params: PyTree) -> PyTree:
    """Decompresses all compressed leaves of a pytree.

    Leaves with the same stack axes (all leaves of a transformer block, say) are decoded together,
    by one call for up to 128 of them, and so are slices of stacks at the same index. A tied leaf,
    which is at several paths, is decoded once and stays tied. Inside of a jitted function, which
    takes each path as an argument of its own, its arguments are not tied.

    Args:
        params: any pytree.

    Returns:
        The same pytree with an array in the place of each `DF11Array` and each `DF11Slice`; all
        other leaves are untouched.

    Raises:
        TypeError: a leaf holds the shapes of arrays in place of arrays.
        ValueError: the arrays of a leaf do not fit each other. Both messages have the leaf's path.
    """
    with_paths, treedef = jax.tree.flatten_with_path(params, is_leaf=is_df11_or_slice)
    leaves = [leaf for _, leaf in with_paths]
    identities = [identity(leaf) if is_df11_or_slice(leaf) else None for leaf in leaves]
    # What one call decodes has the same stack axes or the same index, and the same devices.
    groups: dict[Hashable, dict[Hashable, tuple[str, Any]]] = {}
    for (path, leaf), own in zip(with_paths, identities, strict=True):
        if own is not None:
            stack, index = (leaf.stack, leaf.index) if isinstance(leaf, DF11Slice) else (leaf, None)
            which = None if index is None else identity(index)
            key = stack.stack_shape, which, _devices(stack.header)
            groups.setdefault(key, {}).setdefault(own, (path_name(path), leaf))
    weights: dict[Hashable, Array] = {}
    for members in groups.values():
        names, same = zip(*members.values(), strict=True)
        if isinstance(same[0], DF11Slice):
            decoded = decode_slices([a.stack for a in same], same[0].index, names=names)
        else:
            decoded = decode_stacks(same, names)
        weights |= zip(members, decoded, strict=True)
    return jax.tree.unflatten(
        treedef,
        [
            leaf if own is None else weights[own]
            for leaf, own in zip(leaves, identities, strict=True)
        ],
    )


def _devices(array: Any) -> Hashable:
    """The devices that an array is on; None if it is traced, or on the host."""
    is_on_devices = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    return frozenset(array.sharding.device_set) if is_on_devices else None


def after(params: PyTree, inputs: PyTree) -> PyTree:
    """The same weights, which are decompressed only once `inputs` have been computed.

    XLA moves a decompression whose operands do not change out of a loop, and would hold all weights
    that it decompresses. With inputs that change in the loop, such as the last token, it cannot.

    Args:
        params: any pytree; its `DF11Array` leaves are replaced.
        inputs: a pytree of arrays; other leaves are ignored.

    Returns:
        The same pytree, which has a meaning only inside of a jitted function.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_df11)
    # The decoder reads the header of a tensor, which is small, before anything else.
    headers = iter(tie([leaf.header for leaf in leaves if is_df11(leaf)], inputs))
    return jax.tree.unflatten(
        treedef,
        [
            dataclasses.replace(leaf, header=next(headers)) if is_df11(leaf) else leaf
            for leaf in leaves
        ],
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path, as messages write it: `blocks/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "tensor"
