"""From what Orbax has stored to parameters, in the form that the user asks for."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, Sharding
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import DF11Array, is_df11
from df11_jax._brief import brief
from df11_jax._compress import align_layers, compress_leaves
from df11_jax._compress_tensor import compress_as
from df11_jax._decode import decompress_params
from df11_jax._files import crc32
from df11_jax._flax import move_names, open_boxes
from df11_jax._host_codec import decode
from df11_jax._leaves import naming
from df11_jax._placement import on_cpu, own_mesh
from df11_jax._select import Selection
from df11_jax._shards import divided_as
from df11_jax._stack import fit_exponents
from df11_jax.orbax import _leaf_arrays, _numbers, _plan, _shardings, _stored, _where
from df11_jax.orbax._args import DF11Restore
from df11_jax.orbax._manifest import Keys, StoredLeaf, dtype_of
from df11_jax.orbax._plan import Conversion, LeafPlan
from df11_jax.orbax._stored import StoredItem
from df11_jax.orbax._where import place, sharding_of


def restore(stored: StoredItem, args: DF11Restore) -> PyTree:
    """Restores parameters.

    Args:
        stored: the checkpoint.
        args: the arguments of the call to restore.

    Raises:
        ValueError: the target disagrees with the checkpoint, a checksum is wrong, a number does
            not fit in the target's dtype, or a leaf is damaged; the message, or a note, has the
            paths.
    """
    plans = _plan.plan_leaves(stored, args)
    selection, options = Selection.split(args.compress or {})
    _check_stacks(stored, plans, selection)
    values: dict[Keys, Any] = {}
    for batch in _plan.batches(plans):
        described = [plan.leaf for plan in batch]
        leaves = _read(stored, described, [_where.of_arrays(plan) for plan in batch])
        if args.verify:
            _verify(stored, described, leaves)
        for plan in batch:
            value = leaves.pop(0)
            if _numbers.agrees(plan.leaf, plan.target):
                name, dtype = f"{stored.name}: {plan.leaf.path}", plan.target.dtype
                if sharding_of(plan.target) is not None:  # JAX may have no 64 bits
                    dtype = jax.dtypes.canonicalize_dtype(dtype)
                value = _numbers.as_array(value, dtype, name)
            is_sound = args.verify and plan.leaf.crc32 is not None
            values[plan.leaf.keys] = _convert_and_place(plan, value, is_sound, selection, options)
    for plan in plans:
        if plan.conversion is Conversion.DECOMPRESS:  # by programs that may run still, and fail
            with naming(plan.leaf.path, "decompressing"):
                jax.block_until_ready(values[plan.leaf.keys])
    ordered = [values.pop(plan.leaf.keys) for plan in plans]
    if args.compress is not None:
        paths = [plan.leaf.path for plan in plans]
        selection.warn_if_futile("DF11Restore", zip(paths, ordered, strict=True), stacklevel=1)
        if not any(is_df11(plan.target) for plan in plans):  # whose lengths are to be kept
            align_layers(paths, ordered)
    if args.item is None:
        return stored.manifest.unflatten(ordered)
    targets, treedef = jax.tree.flatten(args.item, is_leaf=is_df11)
    for i, target in enumerate(targets):
        if target is ocp.PLACEHOLDER:  # and stays one, as with Orbax
            ordered.insert(i, target)
    restored = jax.tree.unflatten(treedef, ordered)
    if args.compress is None:
        return restored
    plain = [plan.leaf.path for plan in plans if not plan.leaf.is_compressed]
    moved = {path for path in plain if selection.stack_axis and selection.stack_axes(path)}
    opened = open_boxes(restored, selection.takes_out_of_box)
    return move_names(opened, moved, selection.stack_axis)


def read_leaf(stored: StoredItem, leaf: StoredLeaf) -> Any:
    """Reads one leaf onto the host, in the form in which it is stored, and verifies it.

    Args:
        stored: the checkpoint.
        leaf: one of its leaves.

    Raises:
        ValueError: its checksum is wrong, or it is not what the manifest says.
    """
    values = _read(stored, [leaf], [[None] * len(leaf.shardings)])
    _verify(stored, [leaf], values)
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
    values = _read(stored, [leaf], [_where.of_arrays(plan)])
    _verify(stored, [leaf], values)
    return _convert_and_place(plan, values[0], False, Selection(), {})


def _read(
    stored: StoredItem,
    leaves: Sequence[StoredLeaf],
    destinations: Sequence[Sequence[Sharding | None]],
) -> list[Any]:
    """Reads leaves in the form in which they are stored, onto the host if that is possible.

    Args:
        stored: the checkpoint.
        leaves: some of its leaves.
        destinations: for each, the shardings that its arrays are to get; None for the host.
    """
    wanted: dict[Keys, ocp.RestoreArgs] = {}
    empty: dict[Keys, Any] = {}
    for leaf, shardings in zip(leaves, destinations, strict=True):
        for array in leaf.arrays:
            if 0 in array.shape:
                zeros = jnp.zeros if leaf.is_key else np.zeros
                empty[array.keys] = zeros(array.shape, dtype_of(array.dtype))
            else:
                wanted[array.keys] = _restore_args(leaf, shardings[array.part])
    arrays = stored.read(wanted) | empty
    values = []
    for leaf in leaves:
        parts = [arrays.pop(array.keys) for array in leaf.arrays]
        if leaf.is_compressed:
            values.append(_leaf_arrays.from_stored(parts, leaf))
        else:
            values.append(_numbers.as_saved(parts[0], leaf))
        _check(leaf, values[-1], f"{stored.name}: {leaf.path}")
    return values


def _restore_args(leaf: StoredLeaf, sharding: Sharding | None) -> Any:
    """The arguments by which Orbax restores an array of a leaf."""
    if _numbers.is_scalar(leaf):
        return ocp.RestoreArgs()  # every process needs it, wherever it is to be
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


def _verify(stored: StoredItem, leaves: Sequence[StoredLeaf], values: Sequence[Any]) -> None:
    known = [
        (leaf, _leaf_arrays.checked_arrays(value, leaf.dtype))
        for leaf, value in zip(leaves, values, strict=True)
        if leaf.crc32 is not None
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
    plan: LeafPlan, value: Any, is_sound: bool, selection: Selection, options: Mapping[str, Any]
) -> Any:
    """Compresses or decompresses a leaf as planned, and shards it as the target says.

    Args:
        plan: the plan for the leaf.
        value: the leaf, as it was read.
        is_sound: whether its checksum was verified.
        selection: what the arguments of `compress_params` select.
        options: those of them that say how leaves are compressed.
    """
    path = plan.leaf.path
    if plan.conversion is Conversion.NONE:
        value = _place_arrays(plan, _fit(value, plan.target))
        return value if is_df11(value) else selection.to_front(path, value)
    if plan.conversion is Conversion.DECOMPRESS:
        with naming(path, "decompressing"):
            return _decompress(plan, value, is_sound)
    where = sharding_of(plan.target)
    if plan.conversion is Conversion.DIVIDE:
        value = _decode_on_host(value, path)
        if isinstance(where, NamedSharding) and plan.leaf.layout and not is_df11(plan.target):
            layout = divided_as(plan.leaf.layout, value.ndim, where)
            return compress_as(value, layout, path, where)
    if is_df11(plan.target):
        with on_cpu():  # no device gets what it is not to have
            small = _fit(compress_as(value, plan.target.layout, path), plan.target)
        return jax.tree.map(lambda a, like: place(a, sharding_of(like)), small, plan.target)
    if where is None and plan.leaf.shardings[0]:
        stored = _shardings.from_text(plan.leaf.shardings[0], plan.leaf.shape)
        where = stored if isinstance(stored, NamedSharding) else None
    (small,) = compress_leaves([(path, value)], selection, [where], **options)
    return small if is_df11(small) or where is not None else place(small, _shardings.default())


def _place_arrays(plan: LeafPlan, value: Any) -> Any:
    """A leaf in the form in which it is stored, with each of its arrays where that is to be."""
    arrays = value.payload if is_df11(value) else (value,)
    placed = list(map(place, arrays, _where.of_arrays(plan)))
    return _leaf_arrays.join(placed, plan.leaf) if is_df11(value) else placed[0]


def _decompress(plan: LeafPlan, value: DF11Array, is_sound: bool) -> Any:
    """The weights where they are to be; each device decodes its parts, if it has whole ones."""
    # The name is a part of the program that decodes, so that each leaf would compile one of its
    # own. The decoder needs it only for leaves that may be corrupt. Of those that were so when they
    # were saved, a note on the error has it.
    path = "leaf" if is_sound else plan.leaf.path
    where = _where.of_weights(plan)
    if where is None:
        with own_mesh(value):
            return decompress_params({path: value})[path]
    if _where.of_arrays(plan)[0] is None:  # no device gets what it is not to have
        return place(_decode_on_host(value, plan.leaf.path), where)
    placed = _place_arrays(plan, value)
    with own_mesh(placed):
        # In host memory, where the weights may be to go, programs compute nothing.
        near = jax.device_put(placed, jax.memory.Space.Device)
        weights = decompress_params({path: near})[path]
    return place(weights, where)


def _decode_on_host(value: DF11Array, path: str) -> np.ndarray:
    """The weights of a leaf that was read onto the host, by no program and no device."""
    return decode([np.asarray(part) for part in value.payload], value.layout, path)


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
