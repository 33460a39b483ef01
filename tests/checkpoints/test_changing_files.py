"""Files that are replaced, or written to, while they are read."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import model_files
import numpy as np
import pytest
from payloads import random_weights

from df11_jax import checkpoints, compress_params, decompress_params, published
from df11_jax.checkpoints import convert
from df11_jax.checkpoints._load import load
from df11_jax.checkpoints.differences import differences

NAMES = [f"w{i}" for i in range(6)]


def weights(seed):
    return {name: np.asarray(random_weights((160, 128), seed)) for name in NAMES}


def write(path, format_, seed, shards=1):
    """A checkpoint of a format; all of its tensors are equal."""
    plain = model_files.write_model(path.with_name(f"{path.name} plain"), weights(seed), shards)
    source = checkpoints.open_checkpoint(plain)
    if format_ == "plain":
        plain.rename(path)
    elif format_ == "native":
        convert.write_native(source, path)
    elif format_ == "orbax":
        convert.write_orbax(source, path)
    else:
        shapes = {name: (160, 128) for name in NAMES}
        tensors = {f"{name}.weight": array for name, array in weights(seed).items()}
        published.write(tensors, path, {"w.*": []}, config={})
        return path, {f"{name}.weight": shape for name, shape in shapes.items()}
    return path, None


def versions(loaded):
    """The seeds of the tensors that were loaded."""
    decoded = jax.device_get(jax.tree.leaves(decompress_params(loaded)))
    known = {weights(seed)["w0"].tobytes(): seed for seed in (0, 1)}
    return {known[np.asarray(array).tobytes()] for array in decoded}


@contextlib.contextmanager
def replacing(target, files):
    """A thread that lets one file after another take the place of `target`, atomically."""
    stop, count = threading.Event(), 0

    def work():
        nonlocal count
        while not stop.is_set():
            copy = target.with_name("next")
            shutil.copy(files[count % len(files)], copy)
            os.replace(copy, target)
            count += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert count > 10


@pytest.mark.parametrize("format_", ["plain", "native"])
def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path, format_):
    files = [write(tmp_path / str(seed), format_, seed)[0] / "model.safetensors" for seed in (0, 1)]
    target = tmp_path / "model.safetensors"
    shutil.copy(files[0], target)
    seen = []
    with replacing(target, files):
        for _ in range(60):
            seen.append(versions(checkpoints.load(target)))
    assert {len(found) for found in seen} == {1}
    assert set.union(*seen) == {0, 1}


@pytest.mark.parametrize("format_", ["plain", "native", "published"])
def test_what_was_opened_is_what_is_read(tmp_path, format_):
    path, shapes = write(tmp_path / "x", format_, 0, shards=3)
    other, _ = write(tmp_path / "y", format_, 1, shards=3)
    source = checkpoints.open_checkpoint(path, shapes=shapes)
    for file in other.iterdir():
        os.replace(file, path / file.name)
    assert versions(load(source)) == {0}
    assert versions(checkpoints.load(path, shapes=shapes)) == {1}
    shutil.rmtree(path)
    assert versions(load(source)) == {0}


@pytest.mark.parametrize("format_", ["plain", "native", "published"])
@pytest.mark.parametrize("which", [0, 1])
def test_files_that_were_never_there_together_are_not_opened(tmp_path, monkeypatch, format_, which):
    """Another program replaces a file when some have been opened."""
    path, shapes = write(tmp_path / "x", format_, 0, shards=3)
    other, _ = write(tmp_path / "y", format_, 1, shards=3)
    opened = []
    open_file = os.open

    def opening(name, *args, **kwargs):
        if kwargs.get("dir_fd") is not None and name not in opened:
            opened.append(name)
            if len(opened) == 4:
                replaced = opened[which]
                shutil.copy(other / replaced, path / "next")
                os.replace(path / "next", path / replaced)
        return open_file(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(ValueError, match="was replaced while the other files were opened"):
        checkpoints.open_checkpoint(path, shapes=shapes)


def touch(file):
    """Changes one byte of a file in place, and nothing else."""
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # whatever the clock's step


def largest_file(path):
    files = [file for file in path.rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def changing(source, change, after=3):
    """Lets a file of a checkpoint change when some tensors have been read."""
    count = 0

    def wrap(function):
        def reading(*args, **kwargs):
            nonlocal count
            count += 1
            if count == after:
                change()
            return function(*args, **kwargs)

        return reading

    for name in ("read", "load"):
        if hasattr(source, name):
            setattr(source, name, wrap(getattr(source, name)))
    return source


def read_into(reader, source, path):
    if reader == "load":
        load(source)
    elif reader == "differences":
        list(differences(source, source))
    elif reader == "published":
        patterns = {r"w\d": []}
        published.write(source, path, patterns)
    else:
        getattr(convert, f"write_{reader}")(source, path)


READERS = ["load", "differences", "native", "plain", "orbax"]


@pytest.mark.parametrize("format_", ["plain", "native", "published", "orbax"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_written_to_files_while_they_are_read_is_noticed(tmp_path, format_, reader):
    path, shapes = write(tmp_path / "x", format_, 0)
    source = checkpoints.open_checkpoint(path, shapes=shapes)
    source = changing(source, lambda: touch(largest_file(path)))
    with pytest.raises(ValueError, match=r"changed while it was read|damaged|corrupt"):
        read_into(reader, source, tmp_path / "target")
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "target").glob("*.index.json"))


@pytest.mark.parametrize("format_", ["plain", "orbax"])
@pytest.mark.parametrize("reader", ["native", "plain", "orbax"])
def test_a_source_that_is_replaced_while_it_is_converted(tmp_path, format_, reader):
    """The weights would all be the old ones, but with the new tokenizer."""
    path, _ = write(tmp_path / "x", format_, 0)
    other, _ = write(tmp_path / "y", format_, 1)

    def replace():
        path.rename(tmp_path / "old")
        other.rename(path)

    source = changing(checkpoints.open_checkpoint(path), replace)
    with pytest.raises(ValueError, match=r"changed while it was read"):
        read_into(reader, source, tmp_path / "target")
    with pytest.raises((ValueError, FileNotFoundError)):
        checkpoints.open_checkpoint(tmp_path / "target")


@pytest.mark.parametrize("reader", ["native", "plain", "orbax"])
def test_a_source_that_was_replaced_before_it_is_converted(tmp_path, reader):
    path, _ = write(tmp_path / "x", "plain", 0)
    other, _ = write(tmp_path / "y", "plain", 1)
    source = checkpoints.open_checkpoint(path)
    (path / "model.safetensors").unlink()
    (other / "model.safetensors").rename(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"changed while it was read: model\.safetensors"):
        read_into(reader, source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("reader", ["native", "plain"])
def test_a_mixture_is_not_kept_for_the_next_run(tmp_path, reader):
    """The source is as it was before, to the time of modification, when the next run looks."""
    path, _ = write(tmp_path / "x", "plain", 0, shards=3)
    file = path / "model-00002-of-00003.safetensors"
    shutil.copy2(file, tmp_path / "copy")
    source = changing(checkpoints.open_checkpoint(path), lambda: touch(file), after=4)
    with pytest.raises(ValueError, match=rf"{file}: was changed while it was read"):
        read_into(reader, source, tmp_path / "target")
    assert os.listdir(tmp_path / "target")
    shutil.copy2(tmp_path / "copy", file)
    read_into(reader, checkpoints.open_checkpoint(path), tmp_path / "target")
    both = (checkpoints.open_checkpoint(tmp_path / name) for name in ("x", "target"))
    assert not list(differences(*both))


def test_directories_that_are_overwritten_are_the_old_ones_or_the_new_ones(tmp_path):
    path = tmp_path / "x"
    trees = [{name: np.full(9, seed) for name in NAMES} for seed in (0, 1)]
    checkpoints.save(trees[0], path, max_shard_size=72)
    stop, count = threading.Event(), 0

    def work():
        nonlocal count
        while not stop.is_set():
            count += 1
            checkpoints.save(trees[count % 2], path, max_shard_size=72, overwrite=True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        seen = []
        while count < 5:
            seen.append({int(array[0]) for array in checkpoints.load(path).values()})
    finally:
        stop.set()
        thread.join()
    assert {len(found) for found in seen} == {1}


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    write(tmp_path / "x", "plain", 0)
    monkeypatch.chdir(tmp_path)
    source = checkpoints.open_checkpoint("x")
    monkeypatch.chdir("/")
    (tmp_path / "x" / "tokenizer.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"changed while it was read: tokenizer\.json"):
        convert.write_native(source, tmp_path / "z")


def test_files_that_are_no_part_of_the_model_may_change(tmp_path):
    path, _ = write(tmp_path / "x", "plain", 0)
    shutil.copy(path / "model.safetensors", path / "lora.safetensors")
    source = checkpoints.open_checkpoint(path)
    touch(path / "lora.safetensors")
    assert versions(load(source)) == {0}


def test_published_units_are_not_called_broken_hardware_if_the_source_changes(tmp_path):
    names = {f"{name}.weight": array for name, array in weights(0).items()}
    path = model_files.write_model(tmp_path / "x", names)
    file = path / "model.safetensors"
    source = changing(checkpoints.open_checkpoint(path), lambda: touch(file), after=2)
    with pytest.raises(ValueError, match=r"model\.safetensors: was changed while it was read"):
        published.write(source, tmp_path / "y", {r"w\d": []})
    with pytest.raises(ValueError, match="is incomplete"):
        published.Checkpoint(tmp_path / "y")
    source = checkpoints.open_checkpoint(path)
    with pytest.raises(FileExistsError, match=r"files that changed: model\.safetensors"):
        published.write(source, tmp_path / "y", {r"w\d": []})


def test_a_verification_that_fails_since_the_source_changes(tmp_path, monkeypatch):
    path, _ = write(tmp_path / "x", "plain", 0)

    def encode(*args, **kwargs):
        touch(path / "model.safetensors")
        raise RuntimeError("w0: does not come back; it is a bug, or broken hardware")

    monkeypatch.setattr(convert, "encode", encode)
    with pytest.raises(ValueError, match=r"model\.safetensors: was changed while it was read"):
        convert.write_native(checkpoints.open_checkpoint(path), tmp_path / "y")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "new.txt"])
def test_small_files_count_and_unrelated_ones_do_not(tmp_path, name):
    path, _ = write(tmp_path / "x", "plain", 0)
    (path / "new.txt").touch()
    (path / "original").mkdir()
    before = checkpoints.open_checkpoint(path).fingerprint()
    for unrelated in ("pytorch_model.bin", ".cache", "original/params.json"):
        (path / unrelated).write_text("{}")
    assert checkpoints.open_checkpoint(path).fingerprint() == before
    (path / name).write_text(json.dumps({"changed": 1}))
    assert checkpoints.open_checkpoint(path).fingerprint() != before


@pytest.mark.parametrize("format_", ["plain", "native", "published"])
def test_views_take_no_descriptors(tmp_path, format_):
    path, shapes = write(tmp_path / "x", format_, 0)
    program = f"""
import resource
from df11_jax import checkpoints
source = checkpoints.open_checkpoint({str(path)!r}, shapes={shapes!r})
source.read(next(iter(source.tensors)))  # what is imported at the first use
soft = len(__import__("os").listdir("/proc/self/fd")) + 2
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
views = [source.read(name) for name in source.tensors for _ in range(50)]
print(len(views))
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True
    )
    assert int(result.stdout) == 50 * len(NAMES)


def test_shards_of_another_save_that_differ_in_signs_alone(tmp_path):
    """Their coded exponents are the same, and so are all arrays but those of raw bits."""
    tree = {name: random_weights((256, 128), i) for i, name in enumerate(NAMES)}
    negated = jax.tree.map(lambda array: -array, tree)
    for name, params in (("a", tree), ("b", negated)):
        checkpoints.save(compress_params(params), tmp_path / name, max_shard_size="100 KB")
    files = sorted(file.name for file in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    shutil.copy(tmp_path / "b" / files[1], tmp_path / "a" / files[1])
    with pytest.raises(ValueError, match=f"{files[1]}: .*not of the same save"):
        checkpoints.open_checkpoint(tmp_path / "a")
