"""What checkpoints of safetensors files have in common, whatever their format."""

from collections.abc import Callable, Mapping
from typing import Any

from df11_jax._files.directory import (
    INDEX,
    WHOLE_MODELS,
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
        """The files of tensors, with the names that they are to have in another directory.

        Args:
            files: the file of each tensor.
            metadata: a function that returns the strings that a file had before compression.
            index_metadata: a function that returns those entries of the index's metadata.
        """
        leaves: dict[TensorFile, list[str]] = {}
        for name, file in files.items():
            leaves.setdefault(file, []).append(name)
        index = find_index(self.folder)
        index_file = index or (INDEX if len(leaves) > 1 else None)
        names = {file: self._name(file) for file in leaves}
        # Libraries take a file of this name for all of the model, whatever an index says, and make
        # up the weights that it lacks. DFloat11's own has what belongs to no unit.
        whole = next((name for name in WHOLE_MODELS if name in names.values()), None)
        if whole is not None and len(leaves) > 1:
            index_file = f"{whole}.index.json"
            stem, count = whole.removesuffix(".safetensors"), len(leaves)
            shards = (f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1))
            names = dict(zip(leaves, shards, strict=True))
        return Arrangement(
            {names[file]: held for file, held in leaves.items()},
            {names[file]: metadata(file) for file in leaves},
            index_file,
            index_metadata(read_index_metadata(self.folder, index)) if index else {},
        )

    def _name(self, file: TensorFile) -> str:
        """The name of a file in a directory of its own."""
        name = file.path.name
        alone = self.folder.is_file
        if alone and (not name.endswith(".safetensors") or is_one_of_several(name)):
            return "model.safetensors"
        return name
