import filecmp
import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import model_files
import numpy as np
import pytest
from payloads import assert_same_bits, random_weights
from tiny_llama import LAYER, ORIGINAL, SHARDED, load, original, save

import df11_jax
from df11_jax import checkpoints, published
from df11_jax._files.directory import JOURNAL
from df11_jax._files.safetensors import TensorFile
from df11_jax.published._pytree_source import PyTreeSource

CONFIG = json.loads((ORIGINAL / "config.json").read_text())
PATTERNS = published.default_pattern_dict(CONFIG)


def matrix(shape=(16, 24), seed=0):
    return np.asarray(random_weights(shape, seed))


def with_exponent(exponent):
    weights = matrix().view(np.uint16).copy()
    weights[3, 5] = exponent << 7
    return weights.view(ml_dtypes.bfloat16)


def assert_holds(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert_same_bits(checkpoint.read(name), expected)


class Recorded:
    """A checkpoint that remembers what was read, and can stop."""

    path = pathlib.Path("no directory")
    format = "plain"

    def __init__(self, tensors, stop_at=None):
        self.reads = []
        self._source = tensors
        self._stop_at = stop_at
        self.tensors = PyTreeSource(tensors).tensors

    def read(self, name):
        if name == self._stop_at:
            raise KeyboardInterrupt
        self.reads.append(name)
        return self._source[name]

    def model_config(self):
        return {}

    def arrangement(self):
        return None

    def fingerprint(self):
        return {}

    def check_current(self):
        pass

    def check_unchanged(self):
        pass


def test_same_files_as_the_library(tmp_path):
    path = tmp_path / "new" / "model"
    published.write(original(), path, PATTERNS, config=CONFIG)
    names = {file.name for file in SHARDED.iterdir()}
    assert {file.name for file in path.iterdir()} == names
    for name in names - {"config.json"}:
        assert filecmp.cmp(path / name, SHARDED / name, shallow=False), name
    # The library's own config is made anew by transformers.
    expected = json.loads((SHARDED / "config.json").read_text())
    config = json.loads((path / "config.json").read_text())
    assert config["dfloat11_config"] == expected["dfloat11_config"]
    assert {k: v for k, v in config.items() if k != "dfloat11_config"} == CONFIG
    assert_holds(published.Checkpoint(path), original())


def test_from_a_checkpoint(tmp_path):
    published.write(published.Checkpoint(SHARDED), tmp_path / "a", {"lm_head": []}, config=CONFIG)
    checkpoint = published.Checkpoint(tmp_path / "a")
    assert list(checkpoint.units) == ["lm_head"]
    assert_holds(checkpoint, original())


def test_from_a_pytree(tmp_path):
    blocks = {str(i): {"up": {"weight": random_weights((256, 128), i)}} for i in range(2)}
    params = {"blocks": blocks, "norm": {"scale": jnp.ones(7, jnp.float32)}}
    expected = {f"blocks.{i}.up.weight": blocks[i]["up"]["weight"] for i in blocks}
    published.write(df11_jax.compress_params(params), tmp_path / "model", {r"blocks\.\d+": ["up"]})
    shapes = {name: weights.shape for name, weights in expected.items()}
    checkpoint = published.Checkpoint(tmp_path / "model", shapes)
    for name, weights in expected.items():
        assert_same_bits(checkpoint.read(name), weights)
    np.testing.assert_array_equal(checkpoint.read("norm.scale"), np.ones(7, np.float32))


def test_tensors_beside_units(tmp_path):
    tensors = {
        "a.w.weight": matrix(),
        "a.w.bias": matrix((16,)),
        "a.inner.w.weight": matrix(seed=1),
        "a.inner.count": np.arange(3),
        "ab.weight": matrix((4, 4)),
        "scalar": np.float32(3.0).reshape(()),
        "empty": np.zeros((0, 5), ml_dtypes.bfloat16),
    }
    patterns = {"a": ["w"], r"a\.inner": ["w"]}
    published.write(tensors, tmp_path / "model", patterns)
    for file, names in (
        ("a.safetensors", {"a.w.bias"}),
        ("a_inner.safetensors", {"a.inner.count"}),
        ("model.safetensors", {"ab.weight", "scalar", "empty"}),
    ):
        assert names == set(TensorFile(tmp_path / "model" / file).entries) & set(tensors)
    shapes = {name: array.shape for name, array in tensors.items()}
    checkpoint = published.Checkpoint(tmp_path / "model", shapes)
    assert set(checkpoint.tensors) == set(tensors)
    for name, array in tensors.items():
        assert checkpoint.read(name).dtype == array.dtype
        assert checkpoint.read(name).shape == array.shape
        assert checkpoint.read(name).tobytes() == array.tobytes()


def test_nothing_but_units(tmp_path):
    published.write({"a.weight": matrix()}, tmp_path / "model", {"a": []})
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "a.safetensors",
        "config.json",
    }


def test_first_pattern_counts(tmp_path):
    patterns = {r"a\.b": [], r"a\..": ["c"]}
    tensors = {"a.b.weight": matrix(), "a.b.c.weight": matrix(seed=1)}
    published.write(tensors, tmp_path / "model", patterns)
    shapes = {name: array.shape for name, array in tensors.items()}
    units = published.Checkpoint(tmp_path / "model", shapes).units
    assert {name: unit.tensors for name, unit in units.items()} == {"a.b": ("a.b.weight",)}


def test_interrupted_and_gone_on_with(tmp_path):
    tensors, path = original(), tmp_path / "model"
    stopping = Recorded(tensors, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(KeyboardInterrupt):
        published.write(stopping, path, PATTERNS, config=CONFIG)
    assert not (path / "config.json").exists()
    with pytest.raises(ValueError, match="is incomplete"):
        published.Checkpoint(path)
    done = {file.name: file.stat() for file in path.glob("*.safetensors")}
    assert "model_layers_0.safetensors" in done
    assert len(done) < 5
    # What a killed process leaves, and what a broken disk does.
    (path / "model_layers_1.safetensors.0123abcd.partial").write_bytes(b"x")
    damaged = path / "model_layers_0.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    published.write(tensors, path, PATTERNS, config=CONFIG)
    for name, stat in done.items():
        kept = (path / name).stat().st_ino == stat.st_ino
        assert kept == (name != damaged.name)
    for name in ("model_layers_0.safetensors", "model_layers_1.safetensors", "model.safetensors"):
        assert filecmp.cmp(path / name, SHARDED / name, shallow=False)
    assert not list(path.glob("*.partial"))
    assert not (path / JOURNAL).exists()


def test_gone_on_with_from_other_tensors(tmp_path):
    tensors, path = {"a.weight": matrix(), "b.weight": matrix(seed=1)}, tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        published.write(Recorded(tensors, "b.weight"), path, {".": []})
    with pytest.raises(FileExistsError, match="another job"):
        published.write(tensors, path, {"[ab]": []})
    with pytest.raises(FileExistsError, match="another job"):
        published.write(tensors | {"c.weight": matrix()}, path, {".": []})
    # Of the same names and shapes.
    changed = tensors | {"a.weight": matrix(seed=2)}
    published.write(changed, path, {".": []})
    shapes = {name: array.shape for name, array in tensors.items()}
    assert_holds(published.Checkpoint(path, shapes), changed)


def test_each_tensor_is_read_once_or_twice(tmp_path):
    source = Recorded(original())
    published.write(source, tmp_path / "model", PATTERNS)
    assert set(source.reads) == set(source.tensors)
    units = [name for name in source.reads if name.endswith("proj.weight")]
    assert len(units) == len(set(units))


def test_something_else_is_there(tmp_path):
    file = tmp_path / "model"
    file.touch()
    with pytest.raises(FileExistsError):
        published.write({"a.weight": matrix()}, file, {"a": []})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").touch()
    with pytest.raises(FileExistsError):
        published.write({"a.weight": matrix()}, tmp_path / "x", {"a": []})
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["y"]


def test_exponents_that_the_layout_lacks(tmp_path):
    tensors = {
        "a.weight": with_exponent(239),
        "b.weight": with_exponent(240),
        "c.weight": matrix(),
        "d.u.weight": matrix(),
        "d.v.weight": with_exponent(255),
        "e.weight": with_exponent(255),
    }
    patterns = {"[abc]": [], "d": ["u", "v"]}
    with pytest.raises(ValueError) as info:
        published.write(tensors, tmp_path / "model", patterns)
    message = str(info.value)
    assert "d.v.weight" in message
    assert [unit for unit in "abcde" if f" {unit}: " in message] == ["b", "d"]
    assert not (tmp_path / "model").exists()
    published.write(tensors, tmp_path / "model", {"[ac]": []})
    shapes = {name: array.shape for name, array in tensors.items()}
    assert_holds(published.Checkpoint(tmp_path / "model", shapes), tensors)


@pytest.mark.parametrize(
    ("tensors", "patterns", "messages"),
    [
        ({"a.weight": matrix().astype(np.float32)}, {"a": []}, ["a: a.weight is F32[16, 24]"]),
        ({"a.weight": matrix().astype(np.float16)}, {"a": []}, ["a: a.weight is F16[16, 24]"]),
        ({"a.weight": matrix((8,))}, {"a": []}, ["a.weight is BF16[8], expected a matrix"]),
        ({"a.weight": matrix((2, 2, 2))}, {"a": []}, ["a.weight is BF16[2, 2, 2]"]),
        ({"a.b.weight": matrix()}, {"a": []}, ["a: matches", "a.weight", "no such tensor"]),
        ({"a.b.weight": matrix()}, {"a": ["b", "c"]}, ["a: matches", "a.c.weight"]),
        ({"a.b.weight": matrix()}, {"a": ["b", "b"]}, ["a.b.weight: would be part of"]),
        ({"a.b.weight": matrix()}, {"a": ["b"], r"a\.b": []}, ["a.b.weight: would be part of"]),
        ({"a.b.weight": matrix()}, {"x": []}, ["no module matches", "'a.b.weight'"]),
        ({"a.b.weight": matrix()}, {"(": []}, ["'(' is not a regular expression"]),
        ({"a.b.weight": matrix()}, {"a": "b"}, ["'a': expected a list"]),
        ({"a.b.weight": matrix()}, ["a"], ["expected a dict"]),
        ({"a.b": {"weight": matrix()}, "a": {"b.weight": matrix()}}, {"a": []}, ["two leaves"]),
        ({"a.weight": "text"}, {"a": []}, ["a.weight: is a str"]),
        (
            {"a.weight": np.zeros((4, 4), "datetime64[s]")},
            {"a": []},
            ["cannot hold the dtype datetime64"],
        ),
        ({"model.weight": matrix(), "b": matrix()}, {"model": []}, ["the rest: its file would be"]),
        (
            {"a.b.weight": matrix(), "a_b.weight": matrix()},
            {"a.b": []},
            ["a_b: its file would be", "rename the module"],
        ),
        ({"a/b.weight": matrix()}, {".*": []}, ["a/b: its file would be"]),
    ],
)
def test_refused_before_anything_is_written(tmp_path, tensors, patterns, messages):
    with pytest.raises(ValueError) as info:
        published.write(tensors, tmp_path / "model", patterns)
    for message in messages:
        assert message in str(info.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"config": {"dtype": np.dtype("f4")}},
            TypeError,
            "^config: .* not JSON serializable.*to_",
        ),
        ({"config": 5}, TypeError, "^config: .*not a mapping"),
        ({"threads": 0}, ValueError, "^threads is 0"),
        ({"threads": 1.0}, TypeError, "^threads: expected an integer"),
    ],
)
def test_options_are_checked_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        published.write({"a.weight": matrix()}, tmp_path / "model", {"a": []}, **options)
    assert not list(tmp_path.iterdir())


def test_types_that_numpy_lacks(tmp_path):
    source = checkpoints.open_checkpoint(model_files.write_unknown_dtype(tmp_path / "plain"))
    published.write(source, tmp_path / "model", {"a": []})
    written = published.Checkpoint(tmp_path / "model", {"a.weight": (4, 2)})
    assert written.tensors["four bits"].dtype == "F4"
    assert written.read("four bits").tobytes() == bytes(range(24))


def test_tied_embeddings(tmp_path):
    tensors = original()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = CONFIG | {"tie_word_embeddings": True}
    patterns = published.default_pattern_dict(config)
    assert list(patterns) == [r"model\.layers\.\d+"]
    published.write(tensors, tmp_path / "model", patterns, config=config)
    del tensors["lm_head.weight"]
    assert_holds(published.Checkpoint(tmp_path / "model"), tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight: is not model\.embed_tokens\.weight"):
        published.write(original(), tmp_path / "x", patterns, config=config)


def test_another_config_is_replaced(tmp_path):
    config = {"dfloat11_config": {"pattern_dict": {"old": []}}, "other": 1}
    published.write({"a.weight": matrix()}, tmp_path / "model", {"a": []}, config=config)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["other"] == 1
    assert written["dfloat11_config"] == {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": {"a": []},
    }
    assert config["dfloat11_config"]["pattern_dict"] == {"old": []}


def test_units_of_the_library_are_read_back_from_any_file(tmp_path):
    # The same tensors in one file are the same checkpoint.
    tensors = {}
    for file in SHARDED.glob("*.safetensors"):
        tensors |= load(file)
    save(tmp_path / "model.safetensors", tensors)
    shutil.copy(SHARDED / "config.json", tmp_path)
    assert LAYER in published.Checkpoint(tmp_path).units
    assert_holds(published.Checkpoint(tmp_path), original())
