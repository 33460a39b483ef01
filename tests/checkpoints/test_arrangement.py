"""Files keep their names, and what their headers and indices say, there and back."""

import json

import model_files
import numpy as np
import pytest
from click.testing import CliRunner
from payloads import random_weights
from safetensors.numpy import load_file, save_file

from df11_jax import checkpoints, published
from df11_jax._files.safetensors import TensorFile
from df11_jax.checkpoints.convert import write_native, write_plain
from df11_jax.cli import _commands

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


def write(path, shards, metadata):
    """A folder as diffusers lays it out."""
    path.mkdir()
    weight_map, tensors = {}, {}
    for i in range(shards):
        part = {f"block{i}.{j}": np.asarray(random_weights((192, 128), i + j)) for j in range(2)}
        file = f"{STEM}-{i + 1:05}-of-{shards:05}" if shards > 1 else STEM
        save_file(part, path / f"{file}.safetensors", metadata=metadata)
        tensors |= part
        weight_map |= dict.fromkeys(part, f"{file}.safetensors")
    if shards > 1:
        index = {
            "metadata": {"total_size": 1, "total_parameters": 7},
            "weight_map": weight_map,
        }
        (path / INDEX).write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt", "version": "mine", "structure": "none"}]
)
def test_there_and_back(tmp_path, shards, metadata):
    tensors = write(tmp_path / "plain", shards, metadata)
    source = checkpoints.open_checkpoint(tmp_path / "plain")
    write_native(source, tmp_path / "native")
    native = checkpoints.open_checkpoint(tmp_path / "native")
    assert native.format == "native"
    model_files.assert_holds(native, tensors)
    assert set(checkpoints.load(native)) == set(tensors)
    write_plain(native, tmp_path / "back")
    model_files.assert_holds(checkpoints.open_checkpoint(tmp_path / "back"), tensors)
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert len(names) == (2 if shards == 1 else shards + 2)
    for path in (tmp_path / "native", tmp_path / "back"):
        assert {file.name for file in path.iterdir()} == names
    for file in (tmp_path / "plain").glob("*.safetensors"):
        before, after = TensorFile(file), TensorFile(tmp_path / "back" / file.name)
        assert after.metadata == (metadata or {"format": "pt"})
        assert set(after.entries) == set(before.entries)
    if shards > 1:
        before, after = (
            json.loads((tmp_path / path / INDEX).read_text()) for path in ("plain", "back")
        )
        assert after["weight_map"] == before["weight_map"]
        size = sum(array.nbytes for array in tensors.values())
        assert after["metadata"] == {"total_size": size, "total_parameters": 7}


@pytest.mark.parametrize("stem", ["model", STEM])
@pytest.mark.parametrize("format_", ["plain", "published"])
def test_no_file_is_taken_for_the_whole_model(tmp_path, format_, stem):
    """As transformers takes a model.safetensors, beside whatever index."""
    whole = f"{stem}.safetensors"
    tensors = {f"{i}.weight": np.asarray(random_weights((192, 128), i)) for i in range(3)}
    path, shapes = tmp_path / format_, {name: array.shape for name, array in tensors.items()}
    if format_ == "published":
        published.write(tensors, path, {"[01]": []})
        (path / "model.safetensors").rename(path / whole)  # as diffusers names what has no unit
    else:
        path.mkdir()
        files = {name: f"{name}.safetensors" for name in tensors} | {"2.weight": whole}
        for name, file in files.items():
            save_file({name: tensors[name]}, path / file)
        (path / f"{whole}.index.json").write_text(json.dumps({"weight_map": files}))
    assert (path / whole).exists()
    source = checkpoints.open_checkpoint(path, shapes=shapes)
    write_native(source, tmp_path / "native")
    write_plain(checkpoints.open_checkpoint(tmp_path / "native"), tmp_path / "back")
    write_plain(source, tmp_path / "at once")
    for back in (tmp_path / "back", tmp_path / "at once"):
        model_files.assert_holds(checkpoints.open_checkpoint(back), tensors)
        names = {file.name for file in back.glob("*.safetensors")}
        assert names == {f"{stem}-{i:05}-of-00003.safetensors" for i in (1, 2, 3)}
        index = json.loads((back / f"{whole}.index.json").read_text())["weight_map"]
        assert {name: load_file(back / file)[name].shape for name, file in index.items()} == shapes


@pytest.mark.parametrize("name", ["my.model.safetensors", "model-00002-of-00003.safetensors", "x"])
def test_a_single_file(tmp_path, name):
    write(tmp_path / "folder", 1, {"a": "b"})
    path = (tmp_path / "folder" / f"{STEM}.safetensors").rename(tmp_path / name)
    write_native(checkpoints.open_checkpoint(path), tmp_path / "native")
    (file,) = (tmp_path / "native").iterdir()
    assert file.name == (name if name.startswith("my") else "model.safetensors")
    for native in (tmp_path / "native", file):
        write_plain(checkpoints.open_checkpoint(native), tmp_path / f"from {native.stem}")
        (back,) = (tmp_path / f"from {native.stem}").iterdir()
        assert back.name == file.name
        assert TensorFile(back).metadata == {"a": "b"}


def test_the_commands(tmp_path):
    write(tmp_path / "plain", 2, {"format": "pt"})
    for args in (
        ("compress", "plain", "native"),
        ("verify", "plain", "native"),
        ("decompress", "native", "back"),
        ("verify", "plain", "back"),
    ):
        command, *paths = args
        paths = [str(tmp_path / path) for path in paths]
        result = CliRunner().invoke(_commands.commands, [command, *paths])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "back" / INDEX).exists()


def test_what_the_metadata_of_the_source_says_is_not_believed(tmp_path):
    """Neither by a native file that it is in, nor by one that is made of it."""
    path = tmp_path / "x.safetensors"
    tensors = {"w": np.asarray(random_weights((192, 128)))}
    save_file(tensors, path, metadata={"source:format": "df11_jax", "source:source:a": "b"})
    write_native(checkpoints.open_checkpoint(path), tmp_path / "native")
    write_plain(checkpoints.open_checkpoint(tmp_path / "native"), tmp_path / "back")
    assert TensorFile(tmp_path / "back" / path.name).metadata == TensorFile(path).metadata
