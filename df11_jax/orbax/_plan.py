"""What becomes of each leaf of a checkpoint, and whether that is what the target says."""

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from df11_jax._array import is_df11
from df11_jax._decode import path_name
from df11_jax._select import is_candidate_dtype
from df11_jax.orbax import _describe
from df11_jax.orbax._manifest import Leaf
from df11_jax.orbax._stored import Stored

if TYPE_CHECKING:
    from df11_jax.orbax._v0 import DF11Restore

# So many bytes of weights are read at once, but at least one leaf: for each read, Orbax reads its
# metadata again. What changes its form is to take little memory beside the result.
_BATCH_BYTES = 1 << 30
_CONVERTED_BATCH_BYTES = 1 << 26

# So many disagreements with a target are listed.
_MAX_LISTED = 10


class Form(enum.Enum):
    """What becomes of a leaf on the way."""

    AS_STORED = enum.auto()
    COMPRESS = enum.auto()
    DECOMPRESS = enum.auto()


@dataclasses.dataclass(frozen=True)
class Job:
    """A leaf to be restored.

    Attributes:
        leaf: as it is stored.
        target: the leaf of the target; None if there is no target.
        form: what becomes of it on the way.
    """

    leaf: Leaf
    target: Any
    form: Form

    @property
    def nbytes(self) -> int:
        """What it takes in the larger one of its forms."""
        if self.leaf.dtype is None or self.leaf.is_key:
            return 0
        return math.prod(self.leaf.shape) * np.dtype(self.leaf.dtype).itemsize


def plan(stored: Stored, args: "DF11Restore") -> list[Job]:
    """What is to be restored, and how.

    Args:
        stored: the checkpoint.
        args: what is asked for.

    Returns:
        A job for each leaf: of the target, if there is one, or of the checkpoint.

    Raises:
        ValueError: the target disagrees with the checkpoint, or the checkpoint is a plain one and
            nothing says that it may be.
    """
    if args.item is None:
        _check_is_ours(stored, args)
        wishes = [(leaf, None) for leaf in stored.manifest.leaves]
    else:
        wishes = _match(stored, args)
    jobs = [Job(leaf, target, _form(leaf, target, args)) for leaf, target in wishes]
    casts = args.compress is not None and bool(args.compress.get("cast"))
    _raise_if_any(stored, [problem for job in jobs for problem in _disagreement(job, casts)])
    return jobs


def batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """What is to be read at once."""
    as_stored = [job for job in jobs if job.form is Form.AS_STORED]
    converted = [job for job in jobs if job.form is not Form.AS_STORED]
    for group, limit in ((as_stored, _BATCH_BYTES), (converted, _CONVERTED_BATCH_BYTES)):
        batch: list[Job] = []
        nbytes = 0
        for job in group:
            if batch and nbytes + job.nbytes > limit:
                yield batch
                batch, nbytes = [], 0
            batch.append(job)
            nbytes += job.nbytes
        if batch:
            yield batch


def _check_is_ours(stored: Stored, args: "DF11Restore") -> None:
    if stored.has_manifest or args.compress is not None or args.decompress:
        return
    if not any(leaf.is_compressed for leaf in stored.manifest.leaves):
        raise ValueError(
            f"{stored.name}: has no metadata of df11_jax and no compressed leaf. To compress a "
            "plain checkpoint as it is read, pass compress={}, or in it arguments of "
            "compress_params"
        )


def _match(stored: Stored, args: "DF11Restore") -> list[tuple[Leaf, Any]]:
    """The stored leaf for each leaf of the target, in its order."""
    by_keys = {leaf.keys: leaf for leaf in stored.manifest.leaves}
    wishes, problems = [], []
    for path, target in jax.tree.leaves_with_path(args.item, is_leaf=is_df11):
        leaf = by_keys.pop(_describe.stored_keys(path), None)
        if leaf is None:
            problems.append(f"{path_name(path)}: is not in the checkpoint")
        else:
            wishes.append((leaf, target))
    if not args.partial_restore:
        problems += [f"{leaf.path}: is not in the target" for leaf in by_keys.values()]
    _raise_if_any(stored, problems)
    return wishes


def _form(leaf: Leaf, target: Any, args: "DF11Restore") -> Form:
    if leaf.is_compressed:
        wants_plain = target is not None and not is_df11(target) and args.compress is None
        return Form.DECOMPRESS if args.decompress or wants_plain else Form.AS_STORED
    if args.decompress:
        return Form.AS_STORED
    if is_df11(target):
        return Form.COMPRESS
    if args.compress is None or leaf.dtype is None or leaf.is_key:
        return Form.AS_STORED
    cast = args.compress.get("cast", False)
    return Form.COMPRESS if is_candidate_dtype(np.dtype(leaf.dtype), cast) else Form.AS_STORED


def _disagreement(job: Job, casts: bool) -> Iterator[str]:
    leaf, target = job.leaf, job.target
    if target is None:
        return
    agrees = tuple(np.shape(target)) == leaf.shape
    if hasattr(target, "dtype") and not casts:
        agrees = agrees and str(target.dtype) == leaf.dtype
    if is_df11(target) and leaf.is_compressed:
        agrees = agrees and target.slice_shape == leaf.slice_shape
    if not agrees:
        dtype = str(getattr(target, "dtype", type(target).__name__))
        stack_axes = len(target.stack_shape) if is_df11(target) else None
        shown = Leaf("", (), tuple(np.shape(target)), dtype, (), stack_axes)
        yield f"{leaf.path}: the target has {shown}, stored is {leaf}"


def _raise_if_any(stored: Stored, problems: Sequence[str]) -> None:
    if not problems:
        return
    listed = list(problems[:_MAX_LISTED])
    if len(problems) > _MAX_LISTED:
        listed.append(f"and {len(problems) - _MAX_LISTED} more")
    raise ValueError(
        f"{stored.name}: the target disagrees with the checkpoint:\n  " + "\n  ".join(listed)
    )
