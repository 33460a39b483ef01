"""The handler for `orbax.checkpoint.v1`."""

import asyncio
import itertools
from collections.abc import Awaitable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import v1

from df11_jax._array import is_df11
from df11_jax.orbax._args import DF11Restore, DF11Save
from df11_jax.orbax._v0 import DF11CheckpointHandler

# Numbers the barriers. All processes save the same items, so their counts agree.
_saves = itertools.count()


class DF11Handler(v1.handlers.CheckpointableHandler[Any, Any]):
    """Saves and restores parameters with compressed leaves, for `orbax.checkpoint.v1`.

    It is registered when `df11_jax.orbax` is imported. It then handles what is passed to
    `save_checkpointables` and `load_checkpointables` if that is a `DF11Save`, a `DF11Restore`, or a
    pytree that contains a `DF11Array`. Its files are those of `DF11CheckpointHandler`.
    """

    # Orbax writes this name into checkpoints, so it must not change.
    __module__ = "df11_jax.orbax"

    def __init__(self) -> None:
        self._handler = DF11CheckpointHandler()

    async def save(self, directory: Any, checkpointable: DF11Save | PyTree) -> Awaitable[None]:
        """Starts to save. Once this returns, the parameters may be changed, donated or deleted.

        Args:
            directory: the directory of the item, which may not exist yet.
            checkpointable: the parameters, or the arguments for saving them.

        Returns:
            The rest of the work, to be awaited.
        """
        args = checkpointable if isinstance(checkpointable, DF11Save) else DF11Save(checkpointable)
        operation = f"df11_jax.{next(_saves)}.{directory.path.name}"
        futures = await self._handler.async_save(directory.path, args)
        return self._finish(directory, futures or [], operation)

    async def load(
        self, directory: epath.Path, abstract_checkpointable: DF11Restore | PyTree = None
    ) -> Awaitable[PyTree]:
        """Loads.

        Args:
            directory: the directory of the item.
            abstract_checkpointable: the arguments for restoring, or a target.

        Returns:
            The parameters, to be awaited.
        """
        args = abstract_checkpointable
        if not isinstance(args, DF11Restore):
            args = DF11Restore(args)

        async def restore() -> PyTree:
            return self._handler.restore(directory, args)

        return restore()

    async def metadata(self, directory: epath.Path) -> PyTree:
        """The pytree that `load` returns without a target, with shapes in place of the arrays.

        Args:
            directory: the directory of the item.
        """
        return self._handler.metadata(directory)

    def is_handleable(self, checkpointable: Any) -> bool:
        """Whether this handler is to save it."""
        return isinstance(checkpointable, DF11Save) or _has_compressed_leaf(checkpointable)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Whether this handler is to load it; None leaves that to Orbax."""
        if isinstance(abstract_checkpointable, DF11Restore):
            return True
        return _has_compressed_leaf(abstract_checkpointable) or None

    async def _finish(
        self, directory: Any, futures: list[ocp.future.Future], operation: str
    ) -> None:
        path = await directory.await_creation()
        await asyncio.gather(*(asyncio.to_thread(future.result) for future in futures))
        await v1.multihost.sync_global_processes("written", operation_id=operation)
        if v1.multihost.is_primary_host(0):
            self._handler.finalize(path)
        await v1.multihost.sync_global_processes("finalized", operation_id=operation)


def _has_compressed_leaf(tree: Any) -> bool:
    # Orbax asks this about everything that is to be saved, whatever it is.
    try:
        return any(map(is_df11, jax.tree.leaves(tree, is_leaf=is_df11)))
    except (TypeError, ValueError):
        return False


# Items that the other API has saved name its handler.
v1.handlers.register_handler(DF11Handler, secondary_typestrs=[DF11CheckpointHandler.typestr()])
