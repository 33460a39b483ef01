"""`df11-jax compress --cast`: float32 and float16 checkpoints, rounded to bfloat16."""

import json
import tracemalloc

import families
import jax
import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from commands import die, process, run
from payloads import bits, random_weights

from df11_jax import checkpoints, models
from df11_jax._host_arrays import BFLOAT16
from df11_jax.checkpoints.cast import round_to_bfloat16

LLAMA = families.CONFIGS["llama"] | {
    "hidden_size": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
OVERFLOW = np.float32(3.4e38)  # finite, and nearer to infinity than to the largest bfloat16


def every_kind_of_float32():
    """Weights around every bfloat16: itself, its ties, and the neighbours of both."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    high = np.arange(2**16, dtype=np.uint32) << 16
    return (high[:, None] | low).view(np.float32)


@pytest.mark.parametrize(
    "array", [every_kind_of_float32(), np.arange(2**16, dtype=np.uint16).view(np.float16)]
)
def test_rounds_as_jax_does(array):
    rounded, counts = round_to_bfloat16(array)
    assert rounded.shape == array.shape and rounded.dtype == BFLOAT16
    expected = np.asarray(jnp.asarray(array).astype(jnp.bfloat16))
    is_nan = np.isnan(array)
    # XLA takes subnormal numbers for zeros; numpy and torch round them as all others.
    is_normal = ~is_nan & (np.abs(array.astype(np.float32)) >= np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(bits(rounded)[is_normal], bits(expected)[is_normal])
    assert np.isnan(rounded[is_nan].astype(np.float32)).all()
    subnormal = ~is_nan & ~is_normal
    error = rounded[subnormal].astype(np.float64) - array[subnormal].astype(np.float64)
    assert (np.abs(error) <= 2.0**-134).all()  # half of the smallest bfloat16

    back = rounded.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide = array.astype(np.float64)
    assert counts.weights == array.size
    assert counts.changed == np.count_nonzero((back != wide) & ~is_nan)
    assert counts.infinite == np.count_nonzero(np.isinf(back) & np.isfinite(wide))


@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (3, 80, 96)])
def test_shapes_are_kept(shape):
    array = np.asarray(random_weights(shape, 1), np.float32)
    rounded, counts = round_to_bfloat16(array)
    assert rounded.shape == shape and counts == (array.size, 0, 0)
    np.testing.assert_array_equal(bits(rounded), bits(array.astype(BFLOAT16)))


def test_takes_memory_for_the_result_only():
    array = np.ones(2**23, np.float32)
    tracemalloc.start()
    rounded, _ = round_to_bfloat16(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * rounded.nbytes


def float_model(path, dtype=np.float32, **fields):
    """A model of these types; one of its weights is in the middle of two bfloat16 numbers."""
    source = models.RandomSource(models.read_config(LLAMA))
    tensors = {name: np.array(source.read(name)).astype(dtype) for name in source.tensors}
    tensors["model.embed_tokens.weight"][2, 3] = 1 + 2**-8
    tensors["model.norm.weight"][0] = 1 + 3 * 2**-8
    return families.write_directory(path, LLAMA | fields, tensors, shards=3)


def test_what_it_made_is_a_model(tmp_path):
    path = float_model(tmp_path / "float32", dtype_of_something_else="float32")
    output = run("compress", path, tmp_path / "small", "--cast")
    count = models.RandomSource(models.read_config(LLAMA))
    weights = sum(np.prod(info.shape, dtype=int) for info in count.tensors.values())
    assert f"rounded to bfloat16: 29 tensors, {weights:,} weights, of which 2 (0.0%)" in output
    assert "infinite" not in output and "Nothing got smaller" not in output
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config == LLAMA | {
        "torch_dtype": "bfloat16",
        "dtype_of_something_else": "float32",
    }
    expected = models.load(path, cast=True)
    actual = models.load(tmp_path / "small")
    assert actual.config == expected.config
    assert jax.tree.structure(actual.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)


@pytest.mark.parametrize("format_", ["orbax", "published"])
def test_in_other_formats(tmp_path, format_):
    path = float_model(tmp_path / "float16", np.float16, torch_dtype="float16")
    run("compress", path, tmp_path / "out", "--cast", "--format", format_)
    run("compress", path, tmp_path / "native", "--cast")
    assert "All 29 tensors" in run("verify", tmp_path / "native", tmp_path / "out")
    if format_ == "published":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16"


def test_weights_that_become_infinite_are_named(tmp_path):
    weights = {"a": np.ones((128, 128), np.float32), "b": np.ones(9, np.float32)}
    weights["b"][:5] = [OVERFLOW, -OVERFLOW, np.inf, np.nan, 3.38e38]
    path = model_files.write_model(tmp_path / "plain", weights)
    output = run("compress", path / "model.safetensors", tmp_path / "o.safetensors", "--cast")
    assert "2 tensors, 16,393 weights, of which 3 (0.0%) changed" in output
    assert "2 weights are beyond the largest bfloat16, 3.39e38, and became infinite: in b" in output
    rounded = checkpoints.open_checkpoint(tmp_path / "o.safetensors").read("b")
    inf, largest = np.array([np.inf, 3.38e38]).astype(BFLOAT16)
    expected = np.array([inf, -inf, inf, np.nan, largest], BFLOAT16)
    np.testing.assert_array_equal(bits(rounded)[:5], bits(expected))


@pytest.mark.parametrize("format_", ["native", "orbax", "published"])
def test_without_the_word_it_is_refused(tmp_path, format_):
    path = float_model(tmp_path / "float32")
    arguments = ("compress", path, tmp_path / "out", "--format", format_)
    output = run(*arguments, status=2)
    assert "has no bfloat16 tensors to compress, and" in output and "are float32" in output
    assert "With --cast they are rounded" in output
    assert not (tmp_path / "out").exists()


def test_float32_beside_bfloat16_stays(tmp_path):
    weights = {"a": random_weights((256, 256), 1), "router": np.ones((128, 128), np.float32)}
    path = model_files.write_model(tmp_path / "plain", weights)
    output = run("compress", path, tmp_path / "out")
    assert "1 tensor (64 KiB) is float32, left as in" in output
    model_files.assert_holds(checkpoints.open_checkpoint(tmp_path / "out"), weights)


def test_what_is_not_rounded(tmp_path):
    bfloat16 = {"a": random_weights((256, 256), 1), "integers": np.arange(3, dtype=np.int32)}
    path = model_files.write_model(tmp_path / "plain", bfloat16)
    assert "rounded to bfloat16: 0 tensors" in run("compress", path, tmp_path / "out", "--cast")
    model_files.assert_holds(checkpoints.open_checkpoint(tmp_path / "out"), bfloat16)
    output = run(
        "compress", tmp_path / "out", tmp_path / "no", "--cast", "--format", "orbax", status=2
    )
    assert "out: is a native checkpoint, and only plain ones are rounded" in output
    scales = {"a.qweight": np.zeros((99, 9), np.int32), "a.scales": np.ones((128, 128), np.float16)}
    path = model_files.write_model(tmp_path / "awq", scales)
    assert "is quantized (awq)" in run("compress", path, tmp_path / "no", "--cast", status=2)
    assert "quantized already (awq)" in run("compress", path, tmp_path / "as it is")


def test_interrupted(tmp_path):
    weights = {f"{i}": np.full((128, 129), 1 + 2**-8, np.float32) for i in range(6)}
    weights["bfloat16"] = random_weights((256, 256), 1)
    path, target = model_files.write_model(tmp_path / "mixed", weights, shards=7), tmp_path / "out"
    function = "df11_jax.checkpoints.convert.encode"
    killed = process(die(function, "SIGKILL"), "compress", path, target, "--cast")
    assert killed.returncode < 0, killed.stderr
    assert list(target.glob("*.safetensors"))
    output = run("compress", path, target, status=2)
    assert "of another job" in output and "rounded" in output
    output = run("compress", path, target, "--cast")
    assert "rounded to bfloat16: 3 tensors, " in output
    assert "3 more tensors were rounded before the interruption" in output
    run("compress", path, tmp_path / "at once", "--cast")
    assert "bit-identical" in run("verify", target, tmp_path / "at once")
