"""Orbax checkpoints as one format among others: tests/orbax tests what is in them."""

import concurrent.futures
import json
import os
import time

import jax
import jax.numpy as jnp
import model_files
import numpy as np
import orbax.checkpoint as ocp
import pytest
from click.testing import CliRunner
from payloads import random_weights

import df11_jax
from df11_jax import checkpoints
from df11_jax.cli import _commands
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, DF11Save
from df11_jax.orbax.items import save_item


def run(*args, status=0):
    result = CliRunner().invoke(_commands.commands, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    return result.output


def save(path, params):
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=DF11Save(params))
    return path


def damage(path):
    """Changes a byte in the middle of the largest file."""
    file = max((file for file in path.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def test_commands(tmp_path):
    weights = model_files.tensors()
    plain = model_files.write_model(tmp_path / "plain", weights, shards=2)
    target = tmp_path / "orbax"
    assert "orbax, 17 tensors" in run("compress", plain, target, "--format", "orbax")
    assert "bit-identical" in run("verify", plain, target)
    summary = json.loads(run("info", target, "--json"))
    assert (summary["format"], summary["tensors"]) == ("orbax", len(weights))
    assert summary["nbytes"] < summary["nbytes_before"]
    assert "bit-identical" in run("decompress", target, tmp_path / "again") + run(
        "verify", plain, tmp_path / "again"
    )
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(target, args=DF11Restore(decompress=True))
    for name, array in restored.items():
        assert np.asarray(array).tobytes() == weights[name].tobytes()


def test_what_compress_refuses(tmp_path):
    params = {"w": random_weights((256, 128))}
    path = save(tmp_path / "orbax", params)
    for options in ((), ("--format", "orbax")):
        output = run("compress", path, tmp_path / "native", *options, status=2)
        assert (
            "checkpoints.save(compress_params(checkpoints.load(SRC), stacked=...), DST)" in output
        )
    # As it says.
    loaded = checkpoints.load(path)
    checkpoints.save(df11_jax.compress_params(loaded), tmp_path / "native")
    summary = json.loads(run("info", tmp_path / "native", "--json"))
    assert summary["format"] == "native" and summary["nbytes"] < summary["nbytes_before"]
    assert "bit-identical" in run("verify", path, tmp_path / "native")
    plain = model_files.write_model(tmp_path / "plain", model_files.tensors())
    assert "exists already" in run("compress", plain, path, "--format", "orbax", status=2)


def test_what_another_process_writes_meanwhile_stays(tmp_path):
    plain = model_files.write_model(tmp_path / "plain", model_files.tensors())
    path = tmp_path / "new" / "orbax"

    def write():
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("new/*.partial")) and time.monotonic() < deadline:
            time.sleep(0.001)
        path.mkdir()
        (path / "theirs").touch()

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        written = other.submit(write)
        output = run("compress", plain, path, "--format", "orbax", status=2)
        written.result()
    assert f"{path}: was written by another process meanwhile" in output
    assert [file.name for file in path.parent.rglob("*")] == ["orbax", "theirs"]


def test_a_path_that_is_not_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff")
    weights = {"w": np.asarray(random_weights((256, 128)))}
    plain = model_files.write_model(tmp_path / "plain", weights)
    output = run("compress", plain, path, "--format", "orbax", status=2)
    assert r"\udcff: is not UTF-8" in output and not path.exists()
    save(tmp_path / "orbax", weights).rename(path)
    assert r"\udcff: is not UTF-8" in run("decompress", path, tmp_path / "back", status=2)
    assert not (tmp_path / "back").exists()


def test_a_tensor_without_a_name(tmp_path):
    """Paths of leaves, which Orbax's checkpoints have, cannot be empty."""
    weights = {"": np.asarray(random_weights((256, 128)))}
    plain = model_files.write_model(tmp_path / "plain", weights)
    output = run("compress", plain, tmp_path / "orbax", "--format", "orbax", status=2)
    assert f"{plain}: '': a tensor without a name" in output
    assert not (tmp_path / "orbax").exists()
    run("compress", plain, tmp_path / "native")
    assert "bit-identical" in run("verify", plain, tmp_path / "native")


def test_load_keeps_stacks(tmp_path):
    params = df11_jax.compress_params(
        {"layers": {"w": random_weights((3, 256, 128))}, "norm": random_weights((128,))},
        stacked="^layers",
    )
    loaded = checkpoints.load(save(tmp_path / "orbax", params))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert isinstance(ours, jax.Array)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("saved_by_orbax", [True, False])
def test_numbers_of_python_are_arrays(tmp_path, saved_by_orbax):
    state = {"step": 2**40, "rate": 0.1, "done": True, "weights": random_weights((128, 256))}
    if saved_by_orbax:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "orbax", state)
    else:
        save(tmp_path / "orbax", state)
    checkpoints.save(state, tmp_path / "native")
    for device in (None, jax.devices()[0]):
        loaded = checkpoints.load(tmp_path / "orbax", device=device)
        assert {name: loaded[name].dtype for name in ("step", "rate", "done")} == {
            "step": np.int64,
            "rate": np.float64,
            "done": np.bool_,
        }
        assert {name: loaded[name].item() for name in ("step", "rate", "done")} == {
            name: state[name] for name in ("step", "rate", "done")
        }
        native = checkpoints.load(tmp_path / "native", device=device)
        assert {name: type(leaf) for name, leaf in loaded.items() if name != "weights"} == {
            name: type(leaf) for name, leaf in native.items() if name != "weights"
        }


def test_damage_is_found(tmp_path):
    path = save(tmp_path / "orbax", df11_jax.compress_params({"w": random_weights((512, 512))}))
    damage(path)
    with pytest.raises(ValueError, match=r"orbax: damaged, checksums differ: w has"):
        checkpoints.open_checkpoint(path).read("w")


def test_leaves_that_are_no_arrays(tmp_path):
    path = save(tmp_path / "orbax", {"w": jnp.ones(3), "key": jax.random.key(0)})
    with pytest.raises(ValueError, match="key: is key<fry>, and only arrays"):
        checkpoints.open_checkpoint(path)


def test_two_leaves_of_one_path(tmp_path):
    params = {"a/b": np.zeros(2, np.float32), "a": {"b": np.ones(2, np.float32)}}
    save_item(params, tmp_path / "x")
    with pytest.raises(ValueError, match="x: a/b: two leaves have this path"):
        checkpoints.open_checkpoint(tmp_path / "x")
