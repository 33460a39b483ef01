"""From what Orbax has stored to parameters, in the form that the user asks for."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import DF11Array, is_df11
from df11_jax._brief import brief
from df11_jax._compress import align_layers, compress_leaves
from df11_jax._compress_tensor import compress_as
from df11_jax._decode import decompress_params
from df11_jax._files import crc32
from df11_jax._flax import open_boxes
from df11_jax._host_arrays import cpu_device, to_host
from df11_jax._select import Selection
from df11_jax._shards import divided_as, payload_sharding
from df11_jax._stack import fit_exponents
from df11_jax.orbax import _leaf_arrays, _plan, _shardings, _stored
from df11_jax.orbax._args import DF11Restore
from df11_jax.orbax._manifest import Keys, StoredLeaf, dtype_of
from df11_jax.orbax._plan import Conversion, LeafPlan
from df11_jax.orbax._stored import StoredItem


def restore(stored: StoredItem, args: DF11Restore) -> PyTree:
    """Restores parameters.

    Args:
        stored: the checkpoint.
        args: the arguments of the call to restore.

    Raises:
        ValueError: the target disagrees with the checkpoint, a checksum is wrong, or a leaf is
            damaged; the message has the paths.
    """
    plans = _plan.plan_leaves(stored, args)
    selection, options = Selection.split(args.compress or {})
    _check_stacks(stored, plans, selection)
    values: dict[Keys, Any] = {}
    for batch in _plan.batches(plans):
        leaves = _read(stored, batch)
        if args.verify:
            _verify(stored, batch, leaves)
        for plan in batch:
            values[plan.leaf.keys] = _convert_and_place(plan, leaves.pop(0), selection, options)
    ordered = [values.pop(plan.leaf.keys) for plan in plans]
    if args.compress is not None:
        paths = [plan.leaf.path for plan in plans]
        selection.warn_if_futile("DF11Restore", zip(paths, ordered, strict=True), stacklevel=1)
        if not any(is_df11(plan.target) for plan in plans):  # whose lengths are to be kept
            align_layers(paths, ordered)
    if args.item is None:
        return stored.manifest.unflatten(ordered)
    restored = jax.tree.unflatten(jax.tree.structure(args.item, is_leaf=is_df11), ordered)
    return restored if args.compress is None else open_boxes(restored, selection.takes_out_of_box)


def read_leaf(stored: StoredItem, leaf: StoredLeaf) -> Any:
    """Reads one leaf onto the host, in the form in which it is stored, and verifies it.

    Args:
        stored: the checkpoint.
        leaf: one of its leaves.

    Raises:
        ValueError: its checksum is wrong, or it is not what the manifest says.
    """
    plan = LeafPlan(leaf, None, Conversion.DECOMPRESS)
    values = _read(stored, [plan])
    _verify(stored, [plan], values)
    return values[0]


def read_leaf_onto(stored: StoredItem, leaf: StoredLeaf, where: NamedSharding) -> Any:
    """Reads one leaf onto devices, in the form in which it is stored, and verifies it.

    Args:
        stored: the checkpoint.
        leaf: one of its leaves.
        where: the sharding of each of its arrays; if it is over several processes, each of them
            reads its shards, and all have to call this.

    Raises:
        ValueError: its checksum is wrong, or it is not what the manifest says.
    """
    shapes = [
        jax.ShapeDtypeStruct(array.shape, dtype_of(array.dtype), sharding=where)
        for array in leaf.parts
    ]
    target = _leaf_arrays.join(shapes, leaf) if leaf.is_compressed else shapes[0]
    plan = LeafPlan(leaf, target, Conversion.NONE)
    values = _read(stored, [plan])
    _verify(stored, [plan], values)
    return _convert_and_place(plan, values[0], Selection(), {})


def _read(stored: StoredItem, batch: Sequence[LeafPlan]) -> list[Any]:
    """Reads leaves in the form in which they are stored, onto the host if that is possible."""
    wanted: dict[Keys, ocp.RestoreArgs] = {}
    empty: dict[Keys, Any] = {}
    for plan in batch:
        destinations = _destinations(plan)
        for array in plan.leaf.arrays:
            if 0 in array.shape:
                zeros = jnp.zeros if plan.leaf.is_key else np.zeros
                empty[array.keys] = zeros(array.shape, dtype_of(array.dtype))
            else:
                wanted[array.keys] = _restore_args(plan.leaf, destinations[array.part])
    arrays = stored.read(wanted) | empty
    leaves = []
    for plan in batch:
        name = f"{stored.name}: {plan.leaf.path}"
        parts = [arrays.pop(array.keys) for array in plan.leaf.arrays]
        compressed = plan.leaf.is_compressed
        leaves.append(_leaf_arrays.from_stored(parts, plan.leaf) if compressed else parts[0])
        _check(plan.leaf, leaves[-1], name)
    return leaves


def _destinations(plan: LeafPlan) -> list[jax.sharding.Sharding | None]:
    """The shardings that the arrays of a leaf are to get; None for arrays on the host."""
    texts = plan.leaf.shardings
    if plan.conversion is not Conversion.NONE:
        return [None] * len(texts)
    leaf, target = plan.leaf, plan.target
    if leaf.layout and is_df11(target):
        wanted = [_sharding(array) for array in target.payload]
    else:
        where = None if is_df11(target) else _sharding(target)
        if leaf.layout and where is not None:
            where = payload_sharding(leaf.layout, len(leaf.shape), where)
        wanted = [where] * len(texts)
    destinations = []
    for text, part, sharding in zip(texts, leaf.parts, wanted, strict=True):
        if sharding is None and text is not None:
            sharding = _shardings.from_text(text, part.shape)
        elif sharding is None and leaf.is_compressed:
            sharding = _shardings.default()
        destinations.append(sharding)
    return destinations


def _restore_args(leaf: StoredLeaf, sharding: jax.sharding.Sharding | None) -> Any:
    """The arguments by which Orbax restores an array of a leaf."""
    if leaf.is_key or (sharding is not None and not sharding.is_fully_addressable):
        return ocp.ArrayRestoreArgs(
            restore_type=None if leaf.is_key else jax.Array, sharding=sharding
        )
    if leaf.shardings[0] is None and not leaf.is_compressed:
        return ocp.RestoreArgs()  # a number, a text, or an array on the host, which it stays
    # Not by Orbax onto the device: to be verified, it would have to come back.
    return _stored.ON_HOST


def _check(leaf: StoredLeaf, value: Any, name: str) -> None:
    """Checks that a leaf is what its description says."""
    if isinstance(value, DF11Array):
        stack = _layout.check_payload(value.payload, value.layout, name)
        if stack + value.slice_shape != leaf.shape:
            raise ValueError(f"{name}: a stack of {list(stack)} is stored, expected {leaf}")
        _leaf_arrays.check_header(value, name)
    elif hasattr(value, "dtype"):
        found = dataclasses.replace(leaf, shape=tuple(value.shape), dtype=str(value.dtype))
        if found != leaf:
            raise ValueError(f"{name}: {found} is stored, expected {leaf}")
    elif isinstance(value, str) != (leaf.dtype is None):
        raise ValueError(f"{name}: {brief(value)} is stored, expected {leaf}")


def _verify(stored: StoredItem, batch: Sequence[LeafPlan], values: Sequence[Any]) -> None:
    known = [
        (plan.leaf, _leaf_arrays.checked_arrays(value, plan.leaf.dtype))
        for plan, value in zip(batch, values, strict=True)
        if plan.leaf.crc32 is not None
    ]
    found = crc32.leaf_checksums([arrays for _, arrays in known])
    wrong = [
        f"{leaf.path} has {checksum:08x}, expected {leaf.crc32:08x}"
        for (leaf, _), checksum in zip(known, found, strict=True)
        if checksum != leaf.crc32
    ]
    if wrong:
        raise ValueError(
            f"{stored.name}: damaged, checksums differ: {'; '.join(wrong)}. Restore another copy "
            "of it; verify=False reads it nevertheless"
        )


def _check_stacks(stored: StoredItem, plans: Sequence[LeafPlan], selection: Selection) -> None:
    """Checks, before anything is read, what the arguments of `compress_params` say of stacks."""
    shapes: list[tuple[str, tuple[int, ...] | None]] = []
    for plan in plans:
        leaf = plan.leaf
        is_plain = leaf.dtype is not None and not leaf.is_compressed
        shapes.append((leaf.path, leaf.shape if is_plain else None))
        is_moved = is_plain and selection.stack_axis and selection.stack_axes(leaf.path)
        if is_moved and is_df11(plan.target):
            raise ValueError(
                f"{stored.name}: {leaf.path}: stack_axis moves an axis, so that a DF11Array cannot "
                "be the target. Pass a target of plain leaves, shaped as stored, or none"
            )
    compressed = [plan.leaf.path for plan in plans if plan.leaf.is_compressed]
    selection.check("DF11Restore", shapes, compressed=compressed, stacklevel=1)


def _convert_and_place(
    plan: LeafPlan, value: Any, selection: Selection, options: Mapping[str, Any]
) -> Any:
    """Compresses or decompresses a leaf as planned, and shards it as the target says."""
    path = plan.leaf.path
    if plan.conversion is Conversion.NONE:
        value = _fit(value, plan.target)
        parts = value.payload if is_df11(value) else (value,)
        placed = [
            _place(part, sharding)
            for part, sharding in zip(parts, _destinations(plan), strict=True)
        ]
        if is_df11(value):
            return _leaf_arrays.join(placed, plan.leaf)
        return selection.to_front(path, placed[0])
    where = _sharding(plan.target)
    if plan.conversion is Conversion.DECOMPRESS:
        weights = decompress_params({path: value})[path]
        return weights if is_df11(plan.target) else _place(weights, where)
    if plan.conversion is Conversion.DIVIDE:
        with jax.default_device(cpu_device()):
            value = to_host(decompress_params({path: value})[path])
        if isinstance(where, NamedSharding) and plan.leaf.layout and not is_df11(plan.target):
            layout = divided_as(plan.leaf.layout, value.ndim, where)
            return compress_as(value, layout, path, where)
    if is_df11(plan.target):
        with jax.default_device(cpu_device()):  # no device gets what it is not to have
            small = _fit(compress_as(value, plan.target.layout, path), plan.target)
        return jax.tree.map(lambda a, like: _place(a, _sharding(like)), small, plan.target)
    if where is None and plan.leaf.shardings[0]:
        stored = _shardings.from_text(plan.leaf.shardings[0], plan.leaf.shape)
        where = stored if isinstance(stored, NamedSharding) else None
    (small,) = compress_leaves([(path, value)], selection, [where], **options)
    return small if is_df11(small) or where is not None else _place(small, _shardings.default())


def _fit(value: Any, target: Any) -> Any:
    """A compressed leaf with exponents as long as the target's, if there is room for them.

    Then programs that are compiled for the target take it. That the weights of this checkpoint
    may take more room is no reason not to restore it.
    """
    if not (is_df11(value) and is_df11(target)):
        return value
    if not getattr(value.exponents, "is_fully_addressable", True):
        return value
    try:
        return fit_exponents(value, target.exponents.shape[-1])
    except ValueError:
        return value


def _sharding(target: Any) -> jax.sharding.Sharding | None:
    return getattr(target, "sharding", None)


def _place(array: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """The array with this sharding; unchanged if that is None."""
    is_placed = isinstance(array, jax.Array)
    if sharding is None or (is_placed and array.sharding == sharding):
        return array
    if sharding.is_fully_addressable or (is_placed and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
