"""The handler for `CheckpointManager`, `Checkpointer`, `AsyncCheckpointer` and `Composite`."""

import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from df11_jax.orbax import _restore, _save
from df11_jax.orbax._args import DF11Restore, DF11Save
from df11_jax.orbax._stored import StoredItem


class DF11CheckpointHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores parameters with compressed leaves, for Orbax's first API.

    Its arguments are `DF11Save` and `DF11Restore`; `CheckpointManager` and `Composite` make a
    handler by themselves when they are given these.

    It writes a checkpoint of Orbax's `PyTreeCheckpointHandler`, in OCDBT and zarr 3, with the
    manifest of df11_jax in its metadata. Orbax does not compress the arrays: they are coded
    already, so that this would take time and gain nothing.
    """

    # Orbax writes this name into checkpoints, so it must not change.
    __module__ = "df11_jax.orbax"

    def __init__(
        self, *, multiprocessing_options: ocp.options.MultiprocessingOptions | None = None
    ) -> None:
        """Creates a handler.

        Args:
            multiprocessing_options: options for several processes; see `PyTreeCheckpointHandler`.
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
        self, directory: epath.Path, args: DF11Save
    ) -> list[ocp.future.Future] | None:
        """Starts to save. Once this returns, the parameters may be changed, donated or deleted.

        Args:
            directory: the directory of the item.
            args: the parameters, and how to save them.
        """
        return await self._orbax.async_save(directory, args=_orbax_args(args))

    def save(self, directory: epath.Path, args: DF11Save) -> None:
        """Saves.

        Args:
            directory: the directory of the item.
            args: the parameters, and how to save them.
        """
        self._orbax.save(directory, args=_orbax_args(args))

    def restore(self, directory: epath.PathLike, args: DF11Restore | None = None) -> PyTree:
        """Restores.

        Args:
            directory: the directory of the item.
            args: the selection of what to restore, and in which form; None for everything, as it
                was saved.
        """
        return _restore.restore(StoredItem(directory), args or DF11Restore())

    def metadata(self, directory: epath.PathLike) -> PyTree:
        """The pytree that `restore` returns without a target, with shapes in place of the arrays.

        It can be passed to `size_report`, or, whole or in part, as a target to `DF11Restore`.

        Args:
            directory: the directory of the item.
        """
        return StoredItem(directory).abstract()

    def finalize(self, directory: epath.Path) -> None:
        """Merges the files that the processes have written; Orbax calls this.

        Args:
            directory: the directory of the item.
        """
        self._orbax.finalize(directory)

    def close(self) -> None:
        """Closes the handler."""
        self._orbax.close()


# Orbax finds the handler by the type of the arguments.
ocp.args.register_with_handler(DF11CheckpointHandler, for_save=True)(DF11Save)
ocp.args.register_with_handler(DF11CheckpointHandler, for_restore=True)(DF11Restore)


def _orbax_args(args: DF11Save) -> ocp.args.PyTreeSave:
    item, metadata = _save.to_orbax(args.item, args.compress, args.custom_metadata)
    return ocp.args.PyTreeSave(item, custom_metadata=metadata)
