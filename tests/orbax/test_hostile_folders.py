"""Folders that would take all memory, end the process, or block for ever.

Where a check is missing, TensorStore ends the whole process.
"""

import json
import os

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from orbax_helpers import (
    assert_same_tree,
    compressed_params,
    edit_metadata,
    plain_params,
    restore,
    save,
    save_plain,
)

from df11_jax._files.untrusted_json import MAX_BYTES
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, _save
from df11_jax.orbax.items import LeafReader

FOUR_TIB = 1 << 42

FORMS = [(ocdbt, zarr3) for ocdbt in (True, False) for zarr3 in (True, False)]


def save_as(path, params, ocdbt, zarr3, ours=True):
    """Saves in one of the forms that Orbax reads; `ours` with a manifest, or else without."""
    item, metadata = _save.to_orbax(params, None, None) if ours else (params, None)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(item, custom_metadata=metadata))


def edit_zarr(path, name, ocdbt, zarr3, *, shape=None, chunks=None):
    """Declares another shape of an array, or of its chunks."""
    base = f"file://{path}/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base} if ocdbt else base).result()
    key = f"{name}/{'zarr.json' if zarr3 else '.zarray'}"
    data = json.loads(store.read(key).result().value)
    if shape:
        data["shape"] = shape
    if chunks and zarr3:
        data["chunk_grid"]["configuration"]["chunk_shape"] = chunks
        for codec in data["codecs"]:
            if codec["name"] == "sharding_indexed":
                codec["configuration"]["chunk_shape"] = chunks
    elif chunks:
        data["chunks"] = chunks
    store.write(key, json.dumps(data).encode()).result()


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMS)
@pytest.mark.parametrize("length", [FOUR_TIB // 4, 1, 1 << 24])
@pytest.mark.parametrize("name", ["embedding.exponents", "embedding.tables", "layers.norm"])
def test_arrays_of_another_shape(tmp_path, ocdbt, zarr3, length, name):
    """The manifest knows better than zarr's metadata."""
    path = tmp_path / "x"
    save_as(path, compressed_params(), ocdbt, zarr3)
    shape = [3, length] if name == "layers.norm" else [length]
    edit_zarr(path, name, ocdbt, zarr3, shape=shape, chunks=shape)
    where = name.replace("embedding.", "embedding: ").replace(".", "/")
    with pytest.raises(ValueError, match=rf"x: {where}: .*,?{length}\] is stored, expected"):
        restore(path)
    with pytest.raises(ValueError, match=r"is stored, expected"):
        LeafReader(path).read(name.split(".")[0] if "embed" in name else "layers/norm")


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMS)
def test_chunks_that_are_larger_than_all_files(tmp_path, ocdbt, zarr3):
    path = tmp_path / "x"
    save_as(path, compressed_params(), ocdbt, zarr3)
    edit_zarr(path, "head.bias", ocdbt, zarr3, chunks=[FOUR_TIB // 4])
    with pytest.raises(ValueError, match=r"x: head/bias: .* 4398046511104 bytes, but all files"):
        restore(path)


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMS)
def test_manifest_and_zarr_that_agree_on_too_much(tmp_path, ocdbt, zarr3):
    path = tmp_path / "x"
    save_as(path, plain_params(), ocdbt, zarr3)

    def change(data):
        (entry,) = [leaf for leaf in data["leaves"] if leaf["path"] == "head/bias"]
        entry["shape"] = [FOUR_TIB // 4]

    edit_metadata(path, change)
    edit_zarr(path, "head.bias", ocdbt, zarr3, shape=[FOUR_TIB // 4], chunks=[FOUR_TIB // 4])
    with pytest.raises(ValueError, match=r"x: head/bias: .* 4398046511104 bytes, but all files"):
        restore(path)
    # Whoever adds a file without blocks has as many bytes as he likes, but not the memory.
    with open(path / "d" / "sparse" if ocdbt else path / "sparse", "wb") as file:
        file.truncate(FOUR_TIB)
    with pytest.raises(MemoryError, match=r"x: head\.bias: float32\[1099511627776\] is stored"):
        restore(path)


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMS)
@pytest.mark.parametrize("what", ["shape", "chunks", "both"])
@pytest.mark.parametrize("name", ["head.bias", "embedding.header", "embedding.exponents"])
def test_plain_checkpoints_of_more_than_there_is_memory(tmp_path, ocdbt, zarr3, what, name):
    path = tmp_path / "x"
    save_as(path, compressed_params(), ocdbt, zarr3, ours=False)
    huge = [FOUR_TIB // 4]
    edit_zarr(
        path,
        name,
        ocdbt,
        zarr3,
        shape=huge if what != "chunks" else None,
        chunks=huge if what != "shape" else None,
    )
    with pytest.raises((MemoryError, ValueError), match=r"/x: (head|embedding)"):
        restore(path)


def test_chunks_of_one_element_take_memory_too(tmp_path):
    """TensorStore needs more for each chunk than the element has."""
    path = tmp_path / "x"
    save_as(path, {"w": jnp.ones(8)}, True, False, ours=False)
    edit_zarr(path, "w", True, False, shape=[1 << 32], chunks=[1])
    with pytest.raises(MemoryError, match=r"x: w: float32\[4294967296\] is stored"):
        restore(path, compress={})


def test_zeros_that_are_stored_in_few_bytes_are_no_damage(tmp_path):
    zeros = {"w": jnp.zeros((9, 1 << 21))}  # of 72 MiB
    save_plain(tmp_path / "plain", zeros)
    files = [file for file in (tmp_path / "plain").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1 << 20
    assert_same_tree(restore(tmp_path / "plain", zeros), zeros)
    save(tmp_path / "ours", zeros)
    assert_same_tree(restore(tmp_path / "ours"), zeros)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "x", {**compressed_params(), "text": "abc", "number": 3, "host": np.ones(3)})
    return tmp_path / "x"


def read_all(path):
    handler = DF11CheckpointHandler()
    return [
        lambda: handler.restore(path, DF11Restore()),
        lambda: handler.metadata(path),
        lambda: LeafReader(path),
    ]


def test_pipes_in_the_places_of_files(saved):
    """Of those that are there, and of those that Orbax would read if they were."""
    names = [str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()]
    assert {"_METADATA", "_sharding", "_strings.json", "manifest.ocdbt"} <= set(names)
    for name in [*names, "checkpoint", "array_metadatas/process_1", "head.bias/zarr.json"]:
        file = saved / name
        content = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.parent.mkdir(exist_ok=True)
        os.mkfifo(file)
        for read in read_all(saved):
            with pytest.raises(ValueError, match=f"x: {name}: is a pipe"):
                read()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    restore(saved)


def test_links(saved, tmp_path):
    """To a file is as good as the file; to a folder is refused, since that may have pipes."""
    (saved / "_METADATA").rename(tmp_path / "elsewhere")
    (saved / "_METADATA").symlink_to(tmp_path / "elsewhere")
    restore(saved)
    (saved / "link").symlink_to("/dev")
    for read in read_all(saved):
        with pytest.raises(ValueError, match="x: link: is a pipe, a device or a link"):
            read()


@pytest.mark.parametrize(
    "name",
    ["_METADATA", "_sharding", "_strings.json", "manifest.ocdbt", "array_metadatas/process_0"],
)
def test_metadata_without_end(saved, name):
    os.truncate(saved / name, MAX_BYTES + 1)
    for read in read_all(saved):
        with pytest.raises(ValueError, match=f"x: {name}: has 100000001 bytes, expected at most"):
            read()


def test_fingerprint_changes_with_the_files(saved):
    reader = LeafReader(saved)
    before = reader.fingerprint()
    assert "_METADATA" in before and any(name.startswith("ocdbt.process_0/d/") for name in before)
    assert reader.fingerprint() == before
    file = max((saved / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)
    os.utime(file, ns=(0, 0))
    changed = reader.fingerprint()
    assert {name for name in before if before[name] != changed[name]} == {
        str(file.relative_to(saved))
    }
