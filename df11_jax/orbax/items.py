"""A single item, saved, or read leaf by leaf: for the other packages of df11_jax."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from df11_jax._files.file_stats import file_stats
from df11_jax.orbax import _restore
from df11_jax.orbax._args import DF11Save
from df11_jax.orbax._folder import check_path
from df11_jax.orbax._manifest import StoredLeaf
from df11_jax.orbax._stored import StoredItem
from df11_jax.orbax._v0 import DF11CheckpointHandler

__all__ = ["LeafReader", "StoredLeaf", "check_path", "save_item"]


class LeafReader:
    """A stored item that is read leaf by leaf.

    Attributes:
        leaves: the descriptions of all leaves by path.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        """Reads the metadata.

        Args:
            directory: the directory of the item.

        Raises:
            FileNotFoundError: no pytree was saved there.
            ValueError: the checkpoint is of another format or an unknown version, or is damaged.
        """
        self._directory = Path(directory)
        self._item = StoredItem(directory)
        self.leaves: dict[str, StoredLeaf] = {}
        for leaf in self._item.manifest.leaves:
            if leaf.path in self.leaves:
                raise ValueError(
                    f"{directory}: {leaf.path}: two leaves have this path, in containers whose "
                    "names contain '/'; only df11_jax.orbax.DF11Restore can tell them apart"
                )
            self.leaves[leaf.path] = leaf

    def read(self, path: str) -> Any:
        """One leaf in the form in which it is stored, verified, on the host of this process alone.

        Raises:
            ValueError: its checksum is wrong, or it is not what the manifest says.
        """
        return _restore.read_leaf(self._item, self.leaves[path])

    def read_onto(self, path: str, where: NamedSharding) -> Any:
        """One leaf in the form in which it is stored, verified, of which each device has its shard.

        Several processes, if these are their devices, have to call this together.

        Args:
            path: the path of the leaf.
            where: the sharding of each of its arrays.

        Raises:
            ValueError: its checksum is wrong, or it is not what the manifest says.
        """
        return _restore.read_leaf_onto(self._item, self.leaves[path], where)

    def fingerprint(self) -> dict[str, str]:
        """The size and the time of modification of each file: other ones if any file was changed.

        Returns:
            A text for each file, by its path below the directory, in sorted order.
        """
        return file_stats(self._directory)


def save_item(params: PyTree, directory: epath.PathLike) -> None:
    """Saves parameters; the directory gets its name when it is complete."""
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=DF11Save(params))
