"""The arguments of the handlers: what to save, and what to restore."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from df11_jax._compress import compress_params
from df11_jax._select import Selection

# Arguments of `compress_params` that make no sense here, and what to do.
_REFUSED = {
    "like": "which needs a whole tree: call compress_params first, or restore with a target that "
    "is compressed",
    "shardings": "but what is saved stays where it is, and what is restored goes where the leaves "
    "of the target are",
}


def _check_options(caller: str, compress: Mapping[str, Any] | None) -> None:
    """Raises TypeError or ValueError for what are no arguments of `compress_params`."""
    if compress is None:
        return
    if not isinstance(compress, Mapping):
        raise TypeError(
            f"{caller}: compress: expected a dict of arguments of compress_params, such as {{}} or "
            f'{{"stacked": "^layers/"}}, or None to compress nothing, got {compress!r}'
        )
    known = inspect.signature(compress_params).parameters.keys() - {"params", *_REFUSED}
    for name in compress:
        if name in _REFUSED:
            raise TypeError(f"{caller}: compress has {name!r}, {_REFUSED[name]}")
        if name not in known:
            raise TypeError(
                f"{caller}: compress has {name!r}, and compress_params no such argument; it has "
                f"{', '.join(sorted(known))}"
            )
    Selection.split(compress)


@dataclasses.dataclass
class DF11Save(ocp.args.CheckpointArgs):
    """Arguments for saving, in place of `ocp.args.StandardSave` or `ocp.args.PyTreeSave`.

    Attributes:
        item: a pytree of parameters, compressed or not.
        compress: arguments of `compress_params`, but for `like` and `shardings`, such as
            `{"stacked": "^layers/"}`, or `{}`, to compress plain parameters while they are saved;
            None to save them as they are. Compression happens leaf by leaf on the host, while the
            call to save blocks. Leaves that are sharded over several processes are gathered for it.
            `"stack_axis": 1` brings the stack axis to the front, that of plain stacks as well.
        custom_metadata: JSON to be stored with the item; see `ocp.args.PyTreeSave`.
    """

    __module__ = "df11_jax.orbax"

    item: PyTree
    compress: Mapping[str, Any] | None = None
    custom_metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_options("DF11Save", self.compress)


@dataclasses.dataclass
class DF11Restore(ocp.args.CheckpointArgs):
    """Arguments for restoring, in place of `ocp.args.StandardRestore` or `ocp.args.PyTreeRestore`.

    Without a target, the pytree comes back as it was saved. A target is checked against the
    checkpoint; it determines how each leaf is sharded, and whether it is compressed (unless
    `compress` or `decompress` does that).

    Attributes:
        item: the target: a pytree whose leaves are arrays, `jax.ShapeDtypeStruct`s, or
            `DF11Array`s of these. A stored leaf is decompressed where the target has an array, and
            compressed where it has a `DF11Array`. `ocp.PLACEHOLDER` stays in the place of a leaf
            that is not to be restored.
        compress: arguments of `compress_params`, but for `like` and `shardings`, such as
            `{"stacked": "^layers/"}`, or `{}`, to compress plain leaves as they are read, a few at
            a time; None to leave them as they are. This works with plain checkpoints of Orbax, too,
            which otherwise are refused. `"stack_axis": 1` brings the stack axis to the front as
            leaves are read; a target then has plain leaves, shaped as stored. Of a train state, the
            optimizer's state, below `opt_state`, stays as it is.
        decompress: whether to decompress all leaves as they are read, a few at a time.
        verify: whether to check the checksum of each leaf.
        partial_restore: whether to restore only the leaves that are in the target.
    """

    __module__ = "df11_jax.orbax"

    item: PyTree = None
    compress: Mapping[str, Any] | None = None
    decompress: bool = False
    verify: bool = True
    partial_restore: bool = False

    def __post_init__(self) -> None:
        if self.compress is not None and self.decompress:
            raise ValueError("compress and decompress exclude each other")
        _check_options("DF11Restore", self.compress)
        if self.partial_restore and self.item is None:
            raise ValueError("partial_restore needs a target that says what to restore")
