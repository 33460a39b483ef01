"""From what Orbax has stored to parameters, in the form that is asked for."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from df11_jax import _layout
from df11_jax._array import DF11Array, is_df11
from df11_jax._compress import compress, compress_params
from df11_jax._decode import decompress_params
from df11_jax._files import crc32
from df11_jax._select import Selection
from df11_jax.orbax import _leaf_arrays, _plan, _shardings, _stored
from df11_jax.orbax._manifest import Keys, Leaf
from df11_jax.orbax._plan import Form, Job
from df11_jax.orbax._stored import Stored

if TYPE_CHECKING:
    from df11_jax.orbax._v0 import DF11Restore


def restore(stored: Stored, args: "DF11Restore") -> PyTree:
    """Restores parameters.

    Args:
        stored: the checkpoint.
        args: what to restore.

    Raises:
        ValueError: the target disagrees with the checkpoint, a checksum is wrong, or a leaf is
            damaged; the message has the paths.
    """
    jobs = _plan.plan(stored, args)
    values: dict[Keys, Any] = {}
    for batch in _plan.batches(jobs):
        leaves = _read(stored, batch)
        if args.verify:
            _verify(stored, batch, leaves)
        for job in batch:
            values[job.leaf.keys] = _finish(job, leaves.pop(0), args.compress)
    ordered = [values[job.leaf.keys] for job in jobs]
    if args.compress is not None:
        paths = (job.leaf.path for job in jobs)
        Selection.from_options(**args.compress).warn_if_futile(
            "DF11Restore", zip(paths, ordered, strict=True), stacklevel=1
        )
    if args.item is None:
        return stored.manifest.unflatten(ordered)
    return jax.tree.unflatten(jax.tree.structure(args.item, is_leaf=is_df11), ordered)


def read_leaf(stored: Stored, leaf: Leaf) -> Any:
    """One leaf in the form that it is stored in, verified, on the host.

    Args:
        stored: the checkpoint.
        leaf: one of its leaves.

    Raises:
        ValueError: its checksum is wrong, or it is not what the manifest says.
    """
    job = Job(leaf, None, Form.DECOMPRESS)
    values = _read(stored, [job])
    _verify(stored, [job], values)
    return values[0]


def _read(stored: Stored, batch: Sequence[Job]) -> list[Any]:
    """Reads leaves in the form that they are stored in, onto the host if that can be."""
    wanted: dict[Keys, ocp.RestoreArgs] = {}
    empty: dict[Keys, Any] = {}
    for job in batch:
        destinations = _destinations(job)
        for array in job.leaf.arrays:
            if 0 in array.shape:
                empty[array.keys] = np.zeros(array.shape, array.dtype)
            else:
                wanted[array.keys] = _how(job.leaf, destinations[array.part])
    arrays = stored.read(wanted) | empty
    leaves = []
    for job in batch:
        name = f"{stored.name}: {job.leaf.path}"
        parts = [arrays.pop(array.keys) for array in job.leaf.arrays]
        compressed = job.leaf.is_compressed
        leaves.append(_leaf_arrays.from_stored(parts, job.leaf, name) if compressed else parts[0])
        _check(job.leaf, leaves[-1], name)
    return leaves


def _destinations(job: Job) -> list[jax.sharding.Sharding | None]:
    """Where the arrays of a leaf are to go; None for the host."""
    texts = job.leaf.shardings
    if job.form is not Form.AS_STORED:
        return [None] * len(texts)
    targets: list[Any] = [None] * len(texts)
    if job.leaf.is_compressed == is_df11(job.target):
        targets = list(job.target.payload) if is_df11(job.target) else [job.target]
    destinations = []
    for text, target in zip(texts, targets, strict=True):
        sharding = getattr(target, "sharding", None)
        if sharding is None and text is not None:
            sharding = _shardings.from_text(text)
        elif sharding is None and job.leaf.is_compressed:
            sharding = _shardings.default()
        destinations.append(sharding)
    return destinations


def _how(leaf: Leaf, sharding: jax.sharding.Sharding | None) -> Any:
    """How Orbax is to restore an array of a leaf."""
    if leaf.is_key or (sharding is not None and not sharding.is_fully_addressable):
        return ocp.ArrayRestoreArgs(
            restore_type=None if leaf.is_key else jax.Array, sharding=sharding
        )
    if leaf.shardings[0] is None and not leaf.is_compressed:
        return ocp.RestoreArgs()  # as what it was: a number, a text, an array on the host
    # Not by Orbax onto the device: to be verified, it would have to come back.
    return _stored.ON_HOST


def _check(leaf: Leaf, value: Any, name: str) -> None:
    """Checks that a leaf is what its description says."""
    if isinstance(value, DF11Array):
        stack = _layout.check_payload(value.payload, leaf.slice_shape, name)
        if stack + leaf.slice_shape != leaf.shape:
            raise ValueError(f"{name}: a stack of {list(stack)} is stored, expected {leaf}")
        _leaf_arrays.check_header(value, name)
    elif hasattr(value, "dtype"):
        found = dataclasses.replace(leaf, shape=tuple(value.shape), dtype=str(value.dtype))
        if found != leaf:
            raise ValueError(f"{name}: {found} is stored, expected {leaf}")


def _verify(stored: Stored, batch: Sequence[Job], values: Sequence[Any]) -> None:
    known = [
        (job.leaf, _leaf_arrays.checked_arrays(value, job.leaf.dtype))
        for job, value in zip(batch, values, strict=True)
        if job.leaf.crc32 is not None
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


def _finish(job: Job, value: Any, options: Mapping[str, Any] | None) -> Any:
    """Gives a leaf its form and its place."""
    path = job.leaf.path
    if job.form is Form.AS_STORED:
        parts = value.payload if is_df11(value) else (value,)
        placed = [
            _place(part, sharding) for part, sharding in zip(parts, _destinations(job), strict=True)
        ]
        return _leaf_arrays.join(placed, job.leaf) if is_df11(value) else placed[0]
    if job.form is Form.DECOMPRESS:
        weights = decompress_params({path: value})[path]
        return weights if is_df11(job.target) else _place(weights, _sharding(job.target))
    if is_df11(job.target):
        small = compress(value, stack_axes=len(job.target.stack_shape))
        return jax.tree.map(lambda a, like: _place(a, _sharding(like)), small, job.target)
    small = compress_params({path: value}, **(options or {}))[path]
    if is_df11(small):
        return small
    return _place(small, _sharding(job.target) or _shardings.default())


def _sharding(target: Any) -> jax.sharding.Sharding | None:
    return getattr(target, "sharding", None)


def _place(array: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """The array, sharded like this; as it is if that is None."""
    is_placed = isinstance(array, jax.Array)
    if sharding is None or (is_placed and array.sharding == sharding):
        return array
    if sharding.is_fully_addressable or (is_placed and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
