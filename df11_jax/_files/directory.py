"""Model directories as Hugging Face lays them out: shards, their index, and small files."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from df11_jax._brief import brief
from df11_jax._files.atomic import new_file
from df11_jax._files.safetensors import TensorFile
from df11_jax._files.untrusted_json import MAX_BYTES, parse_json, require_file

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# A directory has this file from before the first shard is written until its index is.
JOURNAL = "df11_jax-incomplete.json"
# In the metadata of an index: checksums of the headers of its shards.
_HEADER_CHECKSUMS = "header_crc32"

_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|ckpt|pkl|h5|gguf"
    r"|msgpack|onnx|onnx_data|npz|npy|partial)"
)
_ONE_OF_SEVERAL = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")
_SMALL = 100 * 2**20  # the largest tokenizers have a third of that


def find_tensors(path: Path) -> dict[str, TensorFile]:
    """Finds the tensors of the file at `path`, or of the shards in the directory there.

    Returns:
        The file that holds each tensor, by the tensor's name.

    Raises:
        FileNotFoundError: nothing is there, or a shard is missing.
        ValueError: the directory is incomplete or not that of a model, or a file is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist")
    if path.is_file():
        return _tensors(path)
    index = find_index(path)
    if index is not None:
        return _indexed_tensors(index)
    if (path / JOURNAL).exists():
        raise ValueError(
            f"{path}: is incomplete: writing it was interrupted, or is still going on. The same "
            "call or command again goes on from there"
        )
    found = sorted(path.glob("*.safetensors"))
    if path / "model.safetensors" in found:
        found = [path / "model.safetensors"]
    if len(found) != 1:
        some = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path}: expected model.safetensors, or shards with {INDEX}, found {some}"
        )
    if _ONE_OF_SEVERAL.search(found[0].name):
        raise ValueError(
            f"{path}: is incomplete: {found[0].name} is there, but neither the other shards nor "
            f"{INDEX}; download or copy the missing files"
        )
    return _tensors(found[0])


def find_index(path: Path) -> Path | None:
    """The index of a directory of shards, if it has one."""
    if (path / INDEX).exists():
        return path / INDEX
    found = list(path.glob("*.safetensors.index.json"))
    # Beside the usual model.safetensors, another index belongs to some other variant.
    return found[0] if len(found) == 1 and not (path / "model.safetensors").exists() else None


def read_index(path: Path) -> dict[str, str]:
    """The names of tensors, and those of the files beside the index that hold them.

    Raises:
        ValueError: the file is not an index.
    """
    return _weight_map(path, read_json(path))


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(
            f"{path}: expected a weight_map from names of tensors to names of files beside it"
        )
    return weight_map


def write_index(path: Path, shards: Iterable[Path], *, checksums: bool) -> None:
    """Writes the index of a directory's shards, which makes it complete.

    Args:
        path: the path of the directory.
        shards: the paths of its shards.
        checksums: whether to add checksums of the shards' headers.
    """
    files = [TensorFile(shard) for shard in shards]
    total = sum(entry.nbytes for file in files for entry in file.entries.values())
    metadata: dict[str, Any] = {"total_size": total}
    if checksums:
        metadata[_HEADER_CHECKSUMS] = {file.path.name: file.header_crc32 for file in files}
    index = {
        "metadata": metadata,
        "weight_map": {name: file.path.name for file in files for name in file.entries},
    }
    with new_file(path / INDEX) as out:
        out.write(json.dumps(index, indent=2).encode() + b"\n")


def read_config(path: Path) -> dict[str, Any]:
    """The model's configuration, in the directory or beside the file; empty if there is none."""
    config = (path if path.is_dir() else path.parent) / CONFIG
    return read_json(config) if config.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the content of the file is not a JSON object.
    """
    size = require_file(path)
    if size > MAX_BYTES:
        raise ValueError(f"{path}: has {size:,} bytes, expected up to {MAX_BYTES:,}")
    try:
        fields = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not a JSON file ({error!s:.200})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got {brief(fields)}")
    return fields


def copy_small_files(source: Path, target: Path, *, without: str | None = None) -> None:
    """Copies the files beside a model's weights, such as tokenizer, licence and configuration.

    Directories, hidden files, large files and weights of any kind are not copied. Nor is the
    configuration if the target has one.

    Args:
        source: the directory of the model. Nothing is copied if it is a file, or a directory that
            has no safetensors files, and so is laid out differently.
        target: the directory to copy to.
        without: an entry that is left out of the copied configuration.
    """
    if not any(source.glob("*.safetensors")):
        return
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == JOURNAL or not path.is_file():
            continue
        if _WEIGHTS.fullmatch(path.name) or path.stat().st_size > _SMALL:
            continue
        if path.name == CONFIG:
            _copy_config(path, target / CONFIG, without)
            continue
        with open(path, "rb") as file, new_file(target / path.name) as out:
            shutil.copyfileobj(file, out)


def _copy_config(source: Path, target: Path, without: str | None) -> None:
    if target.exists():
        return
    text = source.read_bytes()
    config = read_json(source)
    if without in config:
        del config[without]
        text = json.dumps(config, indent=2).encode() + b"\n"
    with new_file(target) as out:
        out.write(text)


def _tensors(path: Path) -> dict[str, TensorFile]:
    file = TensorFile(path)
    return dict.fromkeys(file.entries, file)


def _indexed_tensors(index: Path) -> dict[str, TensorFile]:
    fields = read_json(index)
    weight_map = _weight_map(index, fields)
    checksums = _header_checksums(index, fields)
    tensors: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).exists():
            raise FileNotFoundError(f"{index}: names the shard {shard}, which is missing")
        file = TensorFile(index.parent / shard)
        if checksums is not None:
            _check_header(file, checksums[shard], index)
        tensors |= {name: file for name in file.entries if weight_map.get(name) == shard}
    if missing := set(weight_map) - set(tensors):
        lacking = index.parent / weight_map[min(missing)]
        raise ValueError(f"{lacking}: {min(missing)} is missing, which {index.name} says is there")
    return tensors


def _header_checksums(index: Path, fields: dict[str, Any]) -> dict[str, Any] | None:
    """The checksums of the shards' headers, if the index has them."""
    metadata = fields.get("metadata")
    checksums = metadata.get(_HEADER_CHECKSUMS) if isinstance(metadata, dict) else None
    if checksums is None:
        return None
    shards = set(fields["weight_map"].values())
    if not isinstance(checksums, dict) or checksums.keys() != shards:
        raise ValueError(
            f"{index}: is corrupt: {_HEADER_CHECKSUMS} is {brief(checksums)}, expected those of "
            f"the shards in its weight_map, {brief(sorted(shards))}"
        )
    return checksums


def _check_header(file: TensorFile, expected: Any, index: Path) -> None:
    """Checks that a shard is the one that its index was written for.

    Shards of another save may have the same names, for example after an interrupted copy.
    """
    if file.header_crc32 != expected:
        raise ValueError(
            f"{file.path}: the CRC-32 of its header is {file.header_crc32}, {index.name} expects "
            f"{brief(expected)}: the shard is corrupt, or is not of the same save as the index. "
            "Get another copy of the directory, or write it again"
        )
