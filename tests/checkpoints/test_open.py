import json
import re

import model_files
import numpy as np
import pytest
from payloads import random_weights

from df11_jax import checkpoints, published
from df11_jax.checkpoints.convert import write_native


@pytest.fixture(scope="module")
def weights():
    return model_files.tensors()


@pytest.mark.parametrize("shards", [1, 4])
def test_plain_checkpoints(tmp_path, weights, shards):
    path = model_files.write_model(tmp_path / "model", weights, shards)
    source = checkpoints.open_checkpoint(path)
    assert source.format == "plain"
    assert source.path == path
    model_files.assert_holds(source, weights)
    assert all(info.stored_nbytes == info.nbytes for info in source.tensors.values())
    assert source.tensors["odd"].dtype == "BF16"
    with pytest.raises(KeyError):
        source.read("nothing")


def test_a_single_file(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights) / "model.safetensors"
    for name in ("model.safetensors", "any name"):
        path = path.rename(path.with_name(name))
        model_files.assert_holds(checkpoints.open_checkpoint(str(path)), weights)


def test_one_file_of_another_name_in_a_directory(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights)
    (path / "model.safetensors").rename(path / "diffusion_pytorch_model.safetensors")
    model_files.assert_holds(checkpoints.open_checkpoint(path), weights)


def test_what_the_index_does_not_name_is_not_read(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights, shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["odd"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "consolidated.safetensors").write_bytes(b"of another variant")
    expected = {name: array for name, array in weights.items() if name != "odd"}
    model_files.assert_holds(checkpoints.open_checkpoint(path), expected)


def test_an_index_that_names_nothing_beside_shards(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights, shards=2)
    index = path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    shard = r"model-00001-of-00002\.safetensors"
    with pytest.raises(ValueError, match=f"{index}: is damaged: its weight_map is empty.*{shard}"):
        checkpoints.open_checkpoint(path)


def test_opening_a_native_checkpoint_tells_what_it_takes(tmp_path, weights):
    plain = checkpoints.open_checkpoint(model_files.write_model(tmp_path / "plain", weights))
    write_native(plain, tmp_path / "native")
    source = checkpoints.open_checkpoint(tmp_path / "native")
    assert source.format == "native"
    model_files.assert_holds(source, weights)
    stored = sum(info.stored_nbytes for info in source.tensors.values())
    (file,) = (tmp_path / "native").glob("*.safetensors")
    assert 0 <= file.stat().st_size - stored < 20_000
    assert source.tensors["cube"].stored_nbytes < 0.75 * source.tensors["cube"].nbytes
    assert source.tensors["incompressible"].stored_nbytes == weights["incompressible"].nbytes


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: does not exist"):
        checkpoints.open_checkpoint(tmp_path / "nothing")


def test_directories_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"expected model\.safetensors, or .*, found nothing"):
        checkpoints.open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"found pytorch_model\.bin"):
        checkpoints.open_checkpoint(tmp_path)


def test_shards_without_an_index(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights, shards=2)
    (path / "model.safetensors.index.json").unlink()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    message = "is incomplete: of a model in shards it has {}, but not model.safetensors.index.json"
    with pytest.raises(ValueError, match=re.escape(message.format(f"{first}, {second}"))):
        checkpoints.open_checkpoint(path)
    # As a download leaves it that was interrupted.
    (path / second).unlink()
    with pytest.raises(ValueError, match=re.escape(message.format(first))):
        checkpoints.open_checkpoint(path)


def test_a_missing_shard(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights, shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00002\.safetensors, which is missing"
    ):
        checkpoints.open_checkpoint(path)


def test_a_tensor_that_only_the_index_knows(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights, shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors: more is missing"):
        checkpoints.open_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}', "[" * 9999],
)
def test_bad_indices(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        checkpoints.open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_of_terabytes(tmp_path, weights, name):
    path = model_files.write_model(tmp_path / "model", weights)
    with open(path / name, "wb") as file:
        file.truncate(1 << 40)  # all of it a hole
    with pytest.raises(ValueError, match=f"{path / name}: has 1,099,511,627,776 bytes, expected"):
        checkpoints.open_checkpoint(path)


def test_a_truncated_shard(tmp_path, weights):
    path = model_files.write_model(tmp_path / "model", weights, shards=2)
    shard = path / "model-00001-of-00002.safetensors"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors: .* truncated"):
        checkpoints.open_checkpoint(path)


def test_native_and_plain_files_do_not_mix(tmp_path, weights):
    checkpoints.save({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    model_files.write_model(tmp_path / "model", weights)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "b.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "odd": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"b\.safetensors: expected a file with the metadata"):
        checkpoints.open_checkpoint(tmp_path)


def test_a_published_checkpoint_whose_index_lists_only_the_rest(tmp_path):
    """DFloat11's own index is like that; without config.json, only the units tell the format."""
    path = tmp_path / "published"
    published.write({"a": {"weight": random_weights((16, 8))}, "b": np.ones(3)}, path, {"a": []})
    (path / "config.json").unlink()
    index = {"weight_map": {"b": "model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = checkpoints.open_checkpoint(path, shapes={"a.weight": (16, 8)})
    assert source.format == "published"
    assert set(source.tensors) == {"a.weight", "b"}
