"""The handler for `CheckpointManager`, `Checkpointer`, `AsyncCheckpointer` and `Composite`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from df11_jax.orbax import _restore, _save
from df11_jax.orbax._stored import Stored


class DF11CheckpointHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores parameters with compressed leaves, for Orbax's first API.

    Its arguments are `DF11Save` and `DF11Restore`; `CheckpointManager` and `Composite` make a
    handler by themselves when they are given these.

    What it writes is a checkpoint of Orbax's `PyTreeCheckpointHandler`, in OCDBT and zarr 3, with
    the manifest of df11_jax in its metadata. The arrays are stored as they are: they are coded
    already, and for Orbax to compress them again would take time and gain nothing.
    """

    # Checkpoints name their handler; this is the name that is to last.
    __module__ = "df11_jax.orbax"

    def __init__(
        self, *, multiprocessing_options: ocp.options.MultiprocessingOptions | None = None
    ) -> None:
        """Creates a handler.

        Args:
            multiprocessing_options: as for `PyTreeCheckpointHandler`.
        """
        self._orbax = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=True,
            use_compression=False,
            multiprocessing_options=(
                multiprocessing_options or ocp.options.MultiprocessingOptions()
            ),
        )

    async def async_save(
        self, directory: epath.Path, args: "DF11Save"
    ) -> list[ocp.future.Future] | None:
        """Begins to save: once this returns, the parameters may be changed, donated or deleted.

        Args:
            directory: of the item.
            args: what to save.
        """
        return await self._orbax.async_save(directory, args=_orbax_args(args))

    def save(self, directory: epath.Path, args: "DF11Save") -> None:
        """Saves.

        Args:
            directory: of the item.
            args: what to save.
        """
        self._orbax.save(directory, args=_orbax_args(args))

    def restore(self, directory: epath.PathLike, args: "DF11Restore | None" = None) -> PyTree:
        """Restores.

        Args:
            directory: of the item.
            args: what to restore; None for everything, as it was saved.
        """
        return _restore.restore(Stored(self._orbax, directory), args or DF11Restore())

    def metadata(self, directory: epath.PathLike) -> PyTree:
        """What `restore` without a target gives, with shapes in the places of the arrays.

        It can be passed to `size_report`, or, whole or in part, as a target to `DF11Restore`.

        Args:
            directory: of the item.
        """
        return Stored(self._orbax, directory).abstract()

    def finalize(self, directory: epath.Path) -> None:
        """Merges what the processes have written; called by Orbax.

        Args:
            directory: of the item.
        """
        self._orbax.finalize(directory)

    def close(self) -> None:
        """Closes the handler."""
        self._orbax.close()


@ocp.args.register_with_handler(DF11CheckpointHandler, for_save=True)
@dataclasses.dataclass
class DF11Save(ocp.args.CheckpointArgs):
    """What to save, in the place of `ocp.args.StandardSave` or `ocp.args.PyTreeSave`.

    Attributes:
        item: a pytree of parameters, compressed or not.
        compress: to compress plain parameters on the way out: arguments of `compress_params`, such
            as `{"stacked": "^layers/"}`, or `{}`. It is done while the call to save blocks, leaf by
            leaf, on the host. Leaves that are spread over processes are gathered for it.
        custom_metadata: JSON to be stored with the item, as for `ocp.args.PyTreeSave`.
    """

    __module__ = "df11_jax.orbax"

    item: PyTree
    compress: Mapping[str, Any] | None = None
    custom_metadata: Mapping[str, Any] | None = None


@ocp.args.register_with_handler(DF11CheckpointHandler, for_restore=True)
@dataclasses.dataclass
class DF11Restore(ocp.args.CheckpointArgs):
    """What to restore, in the place of `ocp.args.StandardRestore` or `ocp.args.PyTreeRestore`.

    Without a target, the pytree comes back as it was saved. With one, it is checked against the
    checkpoint, and says which form each leaf is to have (unless `compress` or `decompress` does)
    and how it is to be sharded.

    Attributes:
        item: the target: a pytree whose leaves are arrays, `jax.ShapeDtypeStruct`s, or
            `DF11Array`s of these. A stored leaf is decompressed where the target has an array, and
            compressed where it has a `DF11Array`.
        compress: to compress plain leaves as they are read, a few at a time: arguments of
            `compress_params`, such as `{"stacked": "^layers/"}`, or `{}`. It takes plain
            checkpoints of Orbax, too.
        decompress: give all leaves as plain arrays, decompressed a few at a time as they are read.
        verify: check the checksum of each leaf.
        partial_restore: restore only what is in the target.
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
        if self.partial_restore and self.item is None:
            raise ValueError("partial_restore needs a target that says what to restore")


def _orbax_args(args: DF11Save) -> ocp.args.PyTreeSave:
    item, metadata = _save.to_orbax(args.item, args.compress, args.custom_metadata)
    return ocp.args.PyTreeSave(item, custom_metadata=metadata)
