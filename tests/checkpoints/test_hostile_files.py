"""Files that would block, or take all memory, if they were believed."""

import json
import os
import re
import signal
import tracemalloc
from pathlib import Path

import model_files
import numpy as np
import pytest
from payloads import random_weights
from safetensors.numpy import save_file

import df11_jax
from df11_jax import checkpoints, published
from df11_jax._files.directory import JOURNAL
from df11_jax._files.safetensors import TensorFile
from df11_jax.checkpoints._native_format import METADATA
from df11_jax.checkpoints.convert import write_native

PACKAGE = Path(df11_jax.__file__).parent
PUBLISHED = Path(__file__).parents[1] / "published" / "fixtures" / "tiny_llama" / "sharded"


@pytest.fixture
def alarm():
    """Ends a test that waits for a pipe."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_file_in_a_directory(tmp_path, alarm, name, kind):
    path = model_files.write_model(tmp_path / "x", model_files.tensors(), shards=2)
    (path / name).unlink()
    make(path / name, kind)
    with pytest.raises(ValueError, match=f"{path / name}: is a directory, pipe or device"):
        checkpoints.open_checkpoint(path)


def make(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_by_itself(tmp_path, alarm, kind):
    path = tmp_path / "x.safetensors"
    make(path, kind)
    for open_ in (checkpoints.open_checkpoint, published.Checkpoint, TensorFile):
        with pytest.raises(ValueError, match=r"x\.safetensors: is a directory, pipe or device"):
            open_(path)
    # It would be read as the model whose shapes are wanted.
    with pytest.raises(ValueError, match=r"x\.safetensors: is a directory, pipe or device"):
        published.Checkpoint(PUBLISHED, shapes=path)


def test_small_files_that_are_none_are_not_copied(tmp_path, alarm):
    path = model_files.write_model(tmp_path / "x", {"w": np.asarray(random_weights((160, 128)))})
    make(path / "pipe.txt", "pipe")
    make(path / "zeros.txt", "device")
    write_native(checkpoints.open_checkpoint(path), tmp_path / "y")
    assert not set(os.listdir(tmp_path / "y")) & {"pipe.txt", "zeros.txt"}


@pytest.mark.parametrize(
    "header",
    [
        {"w": ["x" * 1000] * 20_000},
        {"w": {"dtype": "BF16", "shape": [1] * 1_000_000, "data_offsets": [0, 2]}},
        {"w": {"dtype": "BF16", "shape": [1], "data_offsets": {"x" * 20_000_000: 0}}},
        {"__metadata__": {"x": ["y" * 20_000_000]}},
        {"w": {"dtype": ["x" * 20_000_000], "shape": [1], "data_offsets": [0, 2]}},
    ],
)
def test_a_message_about_a_large_header_is_short_and_costs_nothing(tmp_path, header):
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected") as caught:
            TensorFile(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        json.loads(text)
        _, parsing = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400
    # The text, what it says, and room for what the parser has beside it; no text of all of that.
    assert peak < parsing + 2 * len(text) + 1_000_000


@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "config.json"},
        {"w": "model.safetensors.index.json"},
        {"w": "df11_jax-incomplete.json"},
        {"w": "../model.safetensors"},
        {"w": "a\0.safetensors"},
    ],
)
def test_an_index_that_names_what_are_no_weights(tmp_path, weight_map):
    path = model_files.write_model(tmp_path / "x", {"w": np.zeros(3, np.float32)})
    # Beside a whole model, an index of what is missing is ignored.
    (path / "model.safetensors").rename(path / "other.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
        checkpoints.open_checkpoint(path)


def test_structures_of_endless_paths(tmp_path):
    path = tmp_path / "x.safetensors"
    text = json.dumps({"none": ["a/" * 60_000]})
    metadata = METADATA | {"structure": text}
    save_file({"w": np.zeros(3, np.float32)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="structure is"):
        checkpoints.open_checkpoint(path)


def test_a_journal_that_is_no_text(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    (path / JOURNAL).write_bytes(b"\xff\xfe")
    (path / "model-00001-of-00001.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"of another job .*cannot be read"):
        checkpoints.save({"w": np.zeros(3)}, path)


def test_no_message_writes_out_all_of_a_value():
    """`f"{value!r:.80}"` makes all of the text before it takes the beginning."""
    whole = re.compile(r"\{[^{}]*!r:")
    for file in set(PACKAGE.rglob("*.py")) - {PACKAGE / "_brief.py"}:
        assert not whole.search(file.read_text()), file
