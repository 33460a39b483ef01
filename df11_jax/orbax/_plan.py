"""The plan for restoring each leaf of a checkpoint, checked against the target."""

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from df11_jax import _layout
from df11_jax._array import is_df11
from df11_jax._decode import path_name
from df11_jax._layout import Layout
from df11_jax._select import is_candidate_dtype
from df11_jax._shards import payload_sharding
from df11_jax.orbax import _describe, _numbers
from df11_jax.orbax._args import DF11Restore
from df11_jax.orbax._manifest import StoredLeaf
from df11_jax.orbax._stored import StoredItem

# The bytes of weights that are read at once, in order to read many leaves at once: Orbax reads its
# metadata again for each read. Leaves that are converted are to take little memory beside the
# result, so fewer of them are read at once.
_BATCH_BYTES = 1 << 30
_CONVERTED_BATCH_BYTES = 1 << 26

# The number of disagreements with a target that a message lists.
_MAX_LISTED = 10


class Conversion(enum.Enum):
    """The change of a leaf's form while it is restored."""

    NONE = enum.auto()
    COMPRESS = enum.auto()
    DECOMPRESS = enum.auto()
    DIVIDE = enum.auto()  # compressed leaves, for other shards than they were compressed for


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """A leaf to be restored.

    Attributes:
        leaf: the description of the stored leaf.
        target: the leaf of the target; None if there is no target.
        conversion: the change of its form.
    """

    leaf: StoredLeaf
    target: Any
    conversion: Conversion


def plan_leaves(stored: StoredItem, args: DF11Restore) -> list[LeafPlan]:
    """Plans what to restore, and how.

    Args:
        stored: the checkpoint.
        args: the arguments of the call to restore.

    Returns:
        A plan for each leaf of the target but placeholders, if there is one, or else of the
        checkpoint.

    Raises:
        ValueError: the target disagrees with the checkpoint, or the checkpoint is a plain one and
            the arguments do not say that it may be.
    """
    if args.item is None:
        _check_is_ours(stored, args)
        pairs = [(leaf, None) for leaf in stored.manifest.leaves]
    else:
        pairs = _match(stored, args)
    plans = [LeafPlan(leaf, target, _conversion(leaf, target, args)) for leaf, target in pairs]
    casts = args.compress is not None and bool(args.compress.get("cast"))
    _raise_if_any(stored, [problem for plan in plans for problem in _disagreement(plan, casts)])
    return plans


def batches(plans: Sequence[LeafPlan]) -> Iterator[list[LeafPlan]]:
    """Groups the leaves that are read at once."""
    unchanged = [plan for plan in plans if plan.conversion is Conversion.NONE]
    converted = [plan for plan in plans if plan.conversion is not Conversion.NONE]
    for group, limit in ((unchanged, _BATCH_BYTES), (converted, _CONVERTED_BATCH_BYTES)):
        batch: list[LeafPlan] = []
        nbytes = 0
        for plan in group:
            if batch and nbytes + plan.leaf.nbytes > limit:
                yield batch
                batch, nbytes = [], 0
            batch.append(plan)
            nbytes += plan.leaf.nbytes
        if batch:
            yield batch


def _check_is_ours(stored: StoredItem, args: DF11Restore) -> None:
    if stored.has_manifest or args.compress is not None or args.decompress:
        return
    if not any(leaf.is_compressed for leaf in stored.manifest.leaves):
        raise ValueError(
            f"{stored.name}: has no metadata of df11_jax and no compressed leaf. To compress a "
            "plain checkpoint as it is read, pass compress={}, or in it arguments of "
            "compress_params"
        )


def _match(stored: StoredItem, args: DF11Restore) -> list[tuple[StoredLeaf, Any]]:
    """The stored leaf for each leaf of the target but placeholders, in its order."""
    by_keys = {leaf.keys: leaf for leaf in stored.manifest.leaves}
    pairs, problems = [], []
    for path, target in jax.tree.leaves_with_path(args.item, is_leaf=is_df11):
        leaf = by_keys.pop(_describe.stored_keys(path), None)
        if target is ocp.PLACEHOLDER:
            continue
        if leaf is None:
            problems.append(f"{path_name(path)}: is not in the checkpoint")
        else:
            pairs.append((leaf, target))
    if not args.partial_restore:
        problems += [f"{leaf.path}: is not in the target" for leaf in by_keys.values()]
    _raise_if_any(stored, problems)
    return pairs


def _conversion(leaf: StoredLeaf, target: Any, args: DF11Restore) -> Conversion:
    if leaf.is_compressed:
        wants_plain = target is not None and not is_df11(target) and args.compress is None
        if args.decompress or wants_plain:
            return Conversion.DECOMPRESS
        return Conversion.DIVIDE if _is_divided_anew(leaf, target) else Conversion.NONE
    if args.decompress:
        return Conversion.NONE
    if is_df11(target):
        return Conversion.COMPRESS
    if args.compress is None or leaf.dtype is None or leaf.is_key:
        return Conversion.NONE
    cast = args.compress.get("cast", False)
    return (
        Conversion.COMPRESS if is_candidate_dtype(np.dtype(leaf.dtype), cast) else Conversion.NONE
    )


def _is_divided_anew(leaf: StoredLeaf, target: Any) -> bool:
    assert leaf.layout is not None, "the leaf is compressed"
    if is_df11(target):
        return target.layout != leaf.layout
    where = getattr(target, "sharding", None)
    return where is not None and payload_sharding(leaf.layout, len(leaf.shape), where) is None


def _disagreement(plan: LeafPlan, casts: bool) -> Iterator[str]:
    leaf, target = plan.leaf, plan.target
    if target is None:
        return
    agrees = tuple(np.shape(target)) == leaf.shape
    if leaf.dtype is None or isinstance(target, str) or not hasattr(target, "dtype"):
        agrees = agrees and _numbers.is_of_kind(leaf, target)
    elif not casts:
        is_same = str(target.dtype) == leaf.dtype or _numbers.agrees(leaf, target)
        agrees = agrees and is_same
    if is_df11(target) and leaf.is_compressed:
        agrees = agrees and _undivided(target.layout) == _undivided(leaf.layout)
    if not agrees:
        is_text = isinstance(target, str)
        dtype = None if is_text else str(getattr(target, "dtype", type(target).__name__))
        layout = target.layout if is_df11(target) else None
        shown = StoredLeaf("", (), tuple(np.shape(target)), dtype, (), layout)
        yield f"{leaf.path}: the target has {shown}, stored is {leaf}"


def _undivided(layout: Layout | None) -> Layout | None:
    """A layout but for what follows from its parts."""
    return layout and dataclasses.replace(layout, parts=(), steps=_layout.MAX_STEPS)


def _raise_if_any(stored: StoredItem, problems: Sequence[str]) -> None:
    if not problems:
        return
    listed = list(problems[:_MAX_LISTED])
    if len(problems) > _MAX_LISTED:
        listed.append(f"and {len(problems) - _MAX_LISTED} more")
    raise ValueError(
        f"{stored.name}: the target disagrees with the checkpoint:\n  " + "\n  ".join(listed)
    )
