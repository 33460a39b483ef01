"""Model directories as Hugging Face lays them out: shards, their index, and small files."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from df11_jax._brief import brief, listed
from df11_jax._files.atomic import new_file
from df11_jax._files.folder import CONFIG, Folder, JsonFile, is_index
from df11_jax._files.safetensors import TensorFile

INDEX = "model.safetensors.index.json"
# The names that transformers and diffusers give to the only file of a model.
WHOLE_MODELS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_WHOLE = WHOLE_MODELS[0]
# A directory has this file from before the first shard is written until it is complete.
JOURNAL = "df11_jax-incomplete.json"
# In the metadata of an index: checksums of the headers of its shards.
_HEADER_CHECKSUMS = "header_crc32"

_WEIGHTS = re.compile(
    r".*\.(safetensors|(safetensors|bin)\.index(\.[\w-]+)?\.json|bin|pt|pth|ckpt|pkl|h5|gguf"
    r"|msgpack|onnx|onnx_data|npz|npy|partial)",
    re.DOTALL,
)
_ONE_OF_SEVERAL = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.safetensors", re.DOTALL)
_SMALL = 100 * 2**20  # the largest tokenizers have a third of that


def find_tensors(folder: Folder) -> dict[str, TensorFile]:
    """Finds the tensors of a single file, or of the shards in a directory.

    Of several variants in a directory, none is taken that its name does not single out.

    Returns:
        The file that holds each tensor, by the tensor's name.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the directory is incomplete or not that of a model, or a file is damaged.
    """
    path = folder.path
    if folder.is_file:
        return _tensors(folder, path.name)
    index = find_index(folder)
    if index is not None:
        return _indexed_tensors(folder, index)
    check_complete(folder)
    found, indices = folder.tensor_files, find_indices(folder)
    if _WHOLE in found:
        found = [_WHOLE]
    elif indices:
        raise _several_error(path, indices)
    if not found:
        raise ValueError(
            f"{path}: expected model.safetensors, or shards with {INDEX}, found "
            f"{listed(folder.names)}"
        )
    if any(map(is_one_of_several, found)):
        raise ValueError(
            f"{path}: is incomplete: of a model in shards it has {listed(found)}, but not "
            f"{INDEX}; download or copy the missing files"
        )
    if len(found) > 1:
        raise _several_error(path, found)
    return _tensors(folder, found[0])


def _several_error(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path}: holds several variants of a model; give the path of one of these: "
        f"{listed([str(path / name) for name in names])}"
    )


def check_complete(folder: Folder) -> None:
    """Checks that nothing is still to be written to a directory.

    Raises:
        ValueError: something is.
    """
    if JOURNAL in folder.names:
        raise ValueError(
            f"{folder.path}: is incomplete: writing it was interrupted, or is still going on. The "
            "same call or command again goes on from there"
        )


def is_one_of_several(name: str) -> bool:
    """Whether the name of a file says that there are other shards beside it."""
    return _ONE_OF_SEVERAL.fullmatch(name) is not None


def find_index(folder: Folder) -> str | None:
    """The name of the index of a directory of shards, if it has one.

    Raises:
        ValueError: it has shards, and a whole model beside them.
    """
    if folder.is_file or folder.index is not None:
        return folder.index
    if INDEX in folder.names:
        if _WHOLE not in folder.names:
            return INDEX
        shards = set(read_index(folder, INDEX).values())
        if _WHOLE in shards:
            return INDEX
        # transformers would load the one, others the shards. Without these, the index is what is
        # left of a model that was saved here before.
        if shards & set(folder.names):
            raise _several_error(folder.path, [_WHOLE, INDEX])
        return None
    found = find_indices(folder)
    # Beside the usual model.safetensors, another index belongs to some other variant.
    return found[0] if len(found) == 1 and _WHOLE not in folder.names else None


def find_indices(folder: Folder) -> list[str]:
    """The names of all indices in a directory."""
    return [name for name in folder.names if is_index(name)]


def read_index(folder: Folder, name: str) -> dict[str, str]:
    """The names of tensors, and those of the files beside the index that hold them.

    Raises:
        ValueError: the file is not an index.
    """
    weight_map = folder.json(name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        for file in weight_map.values()
    ):
        raise ValueError(
            f"{folder.directory / name}: expected a weight_map from names of tensors to names of "
            "safetensors files beside it"
        )
    return weight_map


def read_index_metadata(folder: Folder, name: str) -> dict[str, Any]:
    """The metadata of an index, other than what `write_index` computes itself."""
    metadata = folder.json(name).get("metadata")
    computed = ("total_size", _HEADER_CHECKSUMS)
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in entries if key not in computed}


def write_index(
    path: Path,
    shards: Iterable[Path],
    *,
    checksums: bool,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the index of a directory's shards, which makes it complete.

    Args:
        path: the path of the index.
        shards: the paths of the shards, beside it.
        checksums: whether to add checksums of the shards' headers.
        metadata: further entries for the metadata of the index.
    """
    total = 0
    weight_map: dict[str, str] = {}
    header_crc32: dict[str, str] = {}
    for shard in shards:  # one at a time: there may be more than can be open
        file = TensorFile(shard)
        total += sum(entry.nbytes for entry in file.entries.values())
        weight_map |= dict.fromkeys(file.entries, shard.name)
        header_crc32[shard.name] = file.header_crc32
    entries: dict[str, Any] = {"total_size": total, **(metadata or {})}
    if checksums:
        entries[_HEADER_CHECKSUMS] = header_crc32
    index = {"metadata": entries, "weight_map": weight_map}
    with new_file(path) as out:
        out.write(json.dumps(index, indent=2).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the content of the file is not a JSON object.
    """
    return JsonFile(path).fields


def small_files(folder: Folder) -> list[str]:
    """The names of the files beside a model's weights: tokenizer, licence, configuration.

    Directories, hidden files, large files and weights of any kind are not among them. A single file
    has none.
    """
    return [
        name
        for name, state in folder.states.items()
        if not folder.is_file
        and state is not None
        and state.nbytes <= _SMALL
        and not name.startswith(".")
        and name != JOURNAL
        and not _WEIGHTS.fullmatch(name)
    ]


def files_of_model(folder: Folder) -> list[str]:
    """The names of the files that are read when a model is written in another format."""
    # A single file is converted without the configuration beside it.
    if folder.is_file:
        return folder.names
    return list(dict.fromkeys([*folder.used, *small_files(folder)]))


def left_beside(folder: Folder) -> list[str]:
    """The names of what is in a model's directory, and neither read nor copied with the model.

    Those are folders, weights in other files and formats, large files, and links to nothing; but
    for hidden ones.
    """
    known = {JOURNAL, *files_of_model(folder)}
    return [name for name in folder.names if name not in known and not name.startswith(".")]


def copy_small_files(folder: Folder, target: Path, config: Mapping[str, Any]) -> None:
    """Copies the files beside a model's weights.

    Args:
        folder: the directory of the model.
        target: the directory to copy to.
        config: the configuration that the copy is to have, if the directory has one.
    """
    for name in small_files(folder):
        path = folder.directory / name
        if name == CONFIG:
            _copy_config(path, target / CONFIG, config)
            continue
        with open(path, "rb") as file, new_file(target / name) as out:
            shutil.copyfileobj(file, out)


def _copy_config(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copies a configuration: byte by byte, if it is to stay what it is."""
    file = JsonFile(source)
    text = file.content
    if file.fields != config:
        text = json.dumps(config, indent=2).encode() + b"\n"
    with new_file(target) as out:
        out.write(text)


def _tensors(folder: Folder, name: str) -> dict[str, TensorFile]:
    file = folder.tensors(name)
    return dict.fromkeys(file.entries, file)


def _indexed_tensors(folder: Folder, index: str) -> dict[str, TensorFile]:
    weight_map = read_index(folder, index)
    if not weight_map and folder.tensor_files:  # without files, it is that of an empty tree
        raise ValueError(
            f"{folder.directory / index}: is damaged: its weight_map is empty, and there are "
            f"{listed(folder.tensor_files)} beside it. Get another copy of it"
        )
    checksums = _header_checksums(folder, index, set(weight_map.values()))
    tensors: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in folder.names:
            raise FileNotFoundError(
                f"{folder.directory / index}: names the shard {shard}, which is missing"
            )
        file = folder.tensors(shard)
        if checksums is not None:
            _check_header(file, checksums[shard], index)
        tensors |= {name: file for name in file.entries if weight_map.get(name) == shard}
    if missing := set(weight_map) - set(tensors):
        lacking = folder.directory / weight_map[min(missing)]
        raise ValueError(f"{lacking}: {min(missing)} is missing, which {index} says is there")
    return tensors


def _header_checksums(folder: Folder, index: str, shards: set[str]) -> dict[str, Any] | None:
    """The checksums of the shards' headers, if the index has them."""
    metadata = folder.json(index).get("metadata")
    checksums = metadata.get(_HEADER_CHECKSUMS) if isinstance(metadata, dict) else None
    if checksums is None:
        return None
    if not isinstance(checksums, dict) or checksums.keys() != shards:
        raise ValueError(
            f"{folder.directory / index}: is corrupt: {_HEADER_CHECKSUMS} is {brief(checksums)}, "
            f"expected those of the shards in its weight_map, {brief(sorted(shards))}"
        )
    return checksums


def _check_header(file: TensorFile, expected: Any, index: str) -> None:
    """Checks that a shard is the one that its index was written for.

    Shards of another save may have the same names, for example after an interrupted copy.
    """
    if file.header_crc32 != expected:
        raise ValueError(
            f"{file.path}: the CRC-32 of its header is {file.header_crc32}, {index} expects "
            f"{brief(expected)}: the shard is corrupt, or is not of the same save as the index. "
            "Get another copy of the directory, or write it again"
        )
