"""What checkpoints of safetensors files have in common, whatever their format."""

from collections.abc import Callable, Mapping
from typing import Any

from df11_jax._files.directory import (
    INDEX,
    files_of_model,
    find_index,
    is_one_of_several,
    read_index_metadata,
)
from df11_jax._files.folder import Folder
from df11_jax._files.safetensors import TensorFile
from df11_jax._files.source import Arrangement, source_changed


class FolderSource:
    """The files of a checkpoint.

    Attributes:
        folder: the files, each of which is opened once.
        path: the path of the directory or file.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.path = folder.path

    def model_config(self) -> dict[str, Any]:
        """The content of the model's config.json; empty if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        return self.folder.config

    def fingerprint(self) -> dict[str, str]:
        """What tells the files that were opened from others, by their names."""
        return {name: str(self.folder.state(name)) for name in files_of_model(self.folder)}

    def check_current(self) -> None:
        """Checks that the files at `path` are still those that were opened.

        Raises:
            ValueError: they are not; the message names some.
        """
        if changed := self.folder.changed(files_of_model(self.folder)):
            raise source_changed(self.path, changed)

    def check_unchanged(self) -> None:
        """Checks that nothing was written to the files since they were opened.

        Raises:
            ValueError: something was, so that what was read may be a mixture.
        """
        self.folder.check_unchanged()

    def _arrange(
        self,
        files: Mapping[str, TensorFile],
        metadata: Callable[[TensorFile], Mapping[str, str]],
        index_metadata: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda entries: entries,
    ) -> Arrangement:
        """The files of tensors.

        Args:
            files: the file of each tensor.
            metadata: a function that returns the strings that a file had before compression.
            index_metadata: a function that returns those entries of the index's metadata.
        """
        shards: dict[str, list[str]] = {}
        for name, file in files.items():
            shards.setdefault(self._name(file), []).append(name)
        index = find_index(self.folder)
        return Arrangement(
            shards,
            {self._name(file): metadata(file) for file in dict.fromkeys(files.values())},
            index or (INDEX if len(shards) > 1 else None),
            index_metadata(read_index_metadata(self.folder, index)) if index else {},
        )

    def _name(self, file: TensorFile) -> str:
        """The name of a file in a directory of its own."""
        name = file.path.name
        alone = self.folder.is_file
        if alone and (not name.endswith(".safetensors") or is_one_of_several(name)):
            return "model.safetensors"
        return name
