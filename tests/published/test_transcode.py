import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from payloads import assert_same_bits, random_weights

import df11_jax
from df11_jax import checkpoints, published
from df11_jax._array import DF11Array

PATTERNS = {r"layers\.\d+": ["up", "down", "tiny"], r"layers\.\d+\.noise": [], "head": []}


def noise(shape):
    """Weights that the native layout makes no smaller: 64 exponents, all equally frequent."""
    random = np.random.default_rng(0)
    values = random.integers(0, 64 << 7, shape, np.uint16)
    return (values | random.integers(0, 2, shape, np.uint16) << 15).view(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def model():
    tensors = {
        "head.weight": random_weights((300, 100), 9),
        "raw.weight": random_weights((200, 100)),
    }
    for i in range(2):
        tensors |= {
            f"layers.{i}.up.weight": random_weights((256, 128), 2 * i),
            f"layers.{i}.down.weight": random_weights((128, 256), 2 * i + 1),
            f"layers.{i}.tiny.weight": random_weights((5, 7), i),
            f"layers.{i}.noise.weight": noise((128, 150)),
            f"layers.{i}.norm.weight": random_weights((128,), i),
        }
    tensors |= {"steps": np.arange(3), "rates": np.linspace(0, 1, 5, dtype=np.float32)}
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("transcode") / "model"
    published.write(model, path, PATTERNS)
    return published.Checkpoint(path, {name: tensor.shape for name, tensor in model.items()})


def test_the_same_as_compressing_the_original(model, checkpoint):
    params = checkpoints.load(checkpoint)
    assert set(params) == set(model)
    compressed = {name for name, leaf in params.items() if isinstance(leaf, DF11Array)}
    # What the publisher left raw is compressed as well, if it gets smaller.
    large = {"head.weight", "raw.weight"}
    assert compressed == {name for name in model if "up" in name or "down" in name} | large
    all_expected = df11_jax.compress_params(model)
    for name in compressed:
        expected = all_expected[name]
        assert params[name].slice_shape == expected.slice_shape
        for ours, theirs in zip(params[name].payload, expected.payload, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert_same_bits(df11_jax.decompress(params[name]), model[name])


def test_what_stays_as_it_is(model, checkpoint):
    params = checkpoints.load(checkpoint)
    for name, leaf in params.items():
        if isinstance(leaf, DF11Array):
            continue
        if name == "steps":
            # int64 is not a type that JAX has by default.
            assert isinstance(leaf, np.ndarray)
        else:
            assert isinstance(leaf, jax.Array)
        assert leaf.shape == model[name].shape
        assert leaf.dtype == model[name].dtype
        assert np.asarray(leaf).tobytes() == model[name].tobytes()


def test_the_result_does_not_need_the_files(model, tmp_path):
    published.write(model, tmp_path / "model", PATTERNS)
    shapes = {name: tensor.shape for name, tensor in model.items()}
    params = checkpoints.load(tmp_path / "model", shapes=shapes)
    before = [np.asarray(array).tobytes() for array in jax.tree.leaves(params)]
    for file in (tmp_path / "model").glob("*.safetensors"):
        # In place, which a mapping would see.
        with open(file, "r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    assert before == [np.asarray(array).tobytes() for array in jax.tree.leaves(params)]


def test_progress(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
    checkpoints.load(checkpoint, progress=True)
    assert "load: 100%" in capsys.readouterr().err


def test_round_trip_through_the_native_layout(model, checkpoint, tmp_path):
    published.write(checkpoints.load(checkpoint), tmp_path / "model", PATTERNS)
    again = published.Checkpoint(tmp_path / "model", {k: v.shape for k, v in model.items()})
    for name, unit in checkpoint.units.items():
        for part, other in zip(
            jax.tree.leaves(checkpoint.read_unit(name)),
            jax.tree.leaves(again.read_unit(unit.name)),
            strict=True,
        ):
            np.testing.assert_array_equal(part, other)


def test_decompressed_units_are_the_model(model, checkpoint):
    for name in checkpoint.units:
        unit = jax.tree.map(jnp.asarray, checkpoint.read_unit(name))
        for tensor, weight in jax.jit(published.decompress)(unit).items():
            assert_same_bits(weight, model[tensor])
