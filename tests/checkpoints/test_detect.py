"""What is said of directories and files that are not, or not yet, what is read."""

import json
import pickle
import re
import zipfile

import jax.numpy as jnp
import model_files
import numpy as np
import orbax.checkpoint as ocp
import pytest
from payloads import random_weights

import df11_jax
from df11_jax import checkpoints, published
from df11_jax.checkpoints.convert import write_native, write_plain
from df11_jax.checkpoints.detect import find_quantization
from df11_jax.orbax import DF11Save

INDEX = ".safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n"
KINDS = {
    "a pointer of Git LFS": LFS_POINTER,
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(100),
    "a pickle": pickle.dumps({"a": list(range(1000))}),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "an array of NumPy": b"\x93NUMPY\x01\0" + bytes(100),
    "a web page": b"<!DOCTYPE html><html></html>",
}


def assert_refused(path, *parts):
    """Opening raises an error that says all of this, in this order, and is not cut off."""
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))) as error:
        checkpoints.open_checkpoint(path)
    assert "..." not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_kinds(tmp_path, kind):
    for name in ("model.safetensors", "anything"):
        (tmp_path / name).write_bytes(KINDS[kind])
        assert_refused(tmp_path / name, f"{tmp_path / name}: is {kind}")
    assert_refused(tmp_path, f"model.safetensors: is {kind}")
    with pytest.raises(ValueError, match=f"model.safetensors: is {kind}"):
        published.Checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_any_protocol(tmp_path, protocol):
    for size in (1, 30, 1000):
        (tmp_path / "model.bin").write_bytes(pickle.dumps(list(range(size)), protocol))
        assert_refused(tmp_path / "model.bin", "model.bin: is a pickle")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-q4.gguf", "a GGUF file"),
        ("pytorch_model.bin", "a pickle"),
        ("consolidated.00.pth", "a pickle"),
        ("tf_model.h5", "an HDF5 file"),
    ],
)
def test_directories_of_other_kinds(tmp_path, name, kind):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(KINDS[kind])
    assert_refused(tmp_path, f"{tmp_path / name}: is {kind}", "expected safetensors files")


def test_folders_are_taken_for_no_files(tmp_path):
    (tmp_path / "weights.bin").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.safetensors").touch()
    assert_refused(tmp_path, "expected model.safetensors, or shards", "found .git, weights.bin")


def test_what_torch_saves(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", KINDS["a pickle"])
    assert_refused(tmp_path, "pytorch_model.bin: is a zip file, as torch.save writes a pickle")


def test_a_config_in_place_of_its_directory(tmp_path):
    path = model_files.write_model(tmp_path / "plain", {"w": np.zeros(3, np.float32)})
    assert_refused(path / "config.json", "config.json: is a JSON file, and no index")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_that_were_not_downloaded(tmp_path, name):
    path = model_files.write_model(tmp_path / "plain", {"w": np.zeros(3, np.float32)})
    (path / name).write_bytes(LFS_POINTER)
    assert_refused(path, f"{name}: is a pointer of Git LFS", "git lfs pull", "expected JSON")


def test_pipelines_name_their_parts(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    for part in ("vae", "transformer", "text_encoder"):
        model_files.write_model(tmp_path / part, {"w": np.zeros(3, np.float32)})
    parts = ", ".join(str(tmp_path / part) for part in ("text_encoder", "transformer", "vae"))
    assert_refused(tmp_path, "holds no weights itself", f"the path of one of these: {parts}")


def test_orbax_managers_and_steps_name_their_items(tmp_path):
    params = {"w": random_weights((256, 128))}
    path = tmp_path / "run"
    with ocp.CheckpointManager(path) as manager:
        for step in (2, 10):
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=DF11Save(df11_jax.compress_params(params)),
                    metrics=ocp.args.JsonSave({"loss": 1.0}),
                ),
            )
    newest, item = path / "10", path / "10" / "params"
    assert_refused(path, f"{path}: holds no weights", f"{item}, {path / '2' / 'params'}")
    with pytest.raises(ValueError, match=f"{newest}: holds no weights .*: {item}$"):
        checkpoints.load(newest)
    assert jnp.array_equal(
        df11_jax.decompress(checkpoints.load(item)["w"]).view(jnp.uint16),
        params["w"].view(jnp.uint16),
    )


def test_the_newest_of_many_steps_are_named(tmp_path):
    for step in range(100):
        (tmp_path / f"step_{step}" / "default").mkdir(parents=True)
        (tmp_path / f"step_{step}" / "default" / "_METADATA").touch()
    assert_refused(tmp_path, f"{tmp_path / 'step_99' / 'default'}, ", "step_92", "and ", "more")


@pytest.mark.parametrize("shards", [1, 3])
def test_of_several_variants_one_can_be_given(tmp_path, shards):
    weights = {"fp32": model_files.tensors(), "ema": {"odd": np.ones((5, 3), np.float32)}}
    weights["ema"] |= {f"w{i}": random_weights((192, 128), i) for i in range(3)}
    path, given = tmp_path / "variants", []
    path.mkdir()
    for variant, tensors in weights.items():
        folder = model_files.write_model(tmp_path / variant, tensors, shards)
        for file in folder.glob("model*"):
            text = file.read_bytes()
            if file.name.endswith(".json"):
                text = text.replace(b"model-", f"{variant}-".encode())
            (path / file.name.replace("model", variant, 1)).write_bytes(text)
        given.append(path / f"{variant}{INDEX if shards > 1 else '.safetensors'}")
    (path / "tokenizer.json").write_text("{}")
    assert_refused(path, f"{path}: holds several variants", f"{given[1]}, {given[0]}")
    for file, tensors in zip(given, weights.values(), strict=True):
        source = checkpoints.open_checkpoint(file)
        model_files.assert_holds(source, tensors)
        native, back = (tmp_path / f"{file.name} {form}" for form in ("native", "back"))
        write_native(source, native)
        write_plain(checkpoints.open_checkpoint(native), back)
        model_files.assert_holds(checkpoints.open_checkpoint(back), tensors)
        if shards > 1:
            assert (back / file.name).exists() and (native / "tokenizer.json").exists()


def test_a_variant_with_its_name_at_the_end_of_its_index(tmp_path):
    """As transformers and diffusers write it."""
    tensors = {f"w{i}": random_weights((192, 128), i) for i in range(3)}
    path = model_files.write_model(tmp_path / "model", tensors, 2)
    for file in path.glob("model*.safetensors"):
        file.rename(path / file.name.replace("model", "model.fp16", 1))
    text = (path / f"model{INDEX}").read_text().replace("model-", "model.fp16-")
    (path / f"model{INDEX}").unlink()
    index = path / "model.safetensors.index.fp16.json"
    index.write_text(text)
    for given in (path, index):
        model_files.assert_holds(checkpoints.open_checkpoint(given), tensors)

    write_native(checkpoints.open_checkpoint(path), tmp_path / "native")
    model_files.assert_holds(checkpoints.open_checkpoint(tmp_path / "native"), tensors)
    (path / f"model{INDEX}").write_text("{}")  # another variant, of which nothing is copied
    write_native(checkpoints.open_checkpoint(index), tmp_path / "one")
    assert not (tmp_path / "one" / f"model{INDEX}").exists()


def test_a_whole_model_beside_shards(tmp_path):
    """Of which transformers loads the first: it leaves an index when it saves to the same place."""
    tensors = [{"w": random_weights((64, 128), i), "v": random_weights((9,), i)} for i in range(2)]
    path = model_files.write_model(tmp_path / "model", tensors[0], 2)
    whole, index = path / "model.safetensors", path / f"model{INDEX}"
    model_files.write_model(tmp_path / "other", tensors[1])
    (tmp_path / "other" / "model.safetensors").rename(whole)
    assert_refused(path, "several variants", str(whole), str(index))
    model_files.assert_holds(checkpoints.open_checkpoint(whole), tensors[1])
    model_files.assert_holds(checkpoints.open_checkpoint(index), tensors[0])
    for shard in path.glob("model-*.safetensors"):
        shard.unlink()
    model_files.assert_holds(checkpoints.open_checkpoint(path), tensors[1])


def test_the_index_of_a_native_checkpoint(tmp_path):
    params = {"w": random_weights((256, 128)), "b": np.ones(3, np.float32)}
    path = tmp_path / "native"
    checkpoints.save(df11_jax.compress_params(params), path, max_shard_size=1000)
    source = checkpoints.open_checkpoint(path / f"model{INDEX}")
    assert source.format == "native"
    assert source.read("w").tobytes() == np.asarray(params["w"]).tobytes()


@pytest.mark.parametrize("version", ["1", "99"])
def test_native_files_of_other_versions(tmp_path, version):
    path = tmp_path / "w.safetensors"
    checkpoints.save({"w": np.ones(3, np.float32)}, path)
    content = path.read_bytes().replace(b'"version":"2"', b'"version":"%s"' % version.encode())
    length = int.from_bytes(content[:8], "little") + len(version) - 1
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    assert_refused(path, f"is of version '{version}' of the native format, expected '2'")


def test_published_checkpoints_of_other_layouts(tmp_path):
    weights = {name: {"weight": random_weights((16, 8))} for name in ("a", "b")}
    path = tmp_path / "published"
    published.write(weights, path, {"a|b": []})
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content.replace(b".gaps", b".gapz"))
    assert_refused(path, "no unit has gaps", "another layout of DFloat11")
    config = json.loads((path / "config.json").read_text())
    config["dfloat11_config"] |= {"bytes_per_thread": 16, "version": "9.0"}
    (path / "config.json").write_text(json.dumps(config))
    # Before anything is said of damage.
    assert_refused(path, "bytes_per_thread is 16", "another layout (DFloat11 '9.0')")


@pytest.mark.parametrize(
    ("names", "config", "method"),
    [
        ((), {}, None),
        (("model.layers.0.mlp.up_proj.weight",), {"quantization_config": None}, None),
        ((), {"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        (("up_proj.qweight", "up_proj.g_idx", "up_proj.scales"), {}, "gptq"),
        (("up_proj.qweight", "up_proj.qzeros", "up_proj.scales"), {}, "awq"),
        (("up_proj.weight", "up_proj.weight_scale_inv"), {}, "fp8"),
    ],
)
def test_quantized_models(names, config, method):
    assert find_quantization(names, config) == method
