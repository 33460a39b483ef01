"""Damaged, foreign, and newer checkpoints."""

import dataclasses
import gc
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax_helpers import (
    assert_same_tree,
    compressed_params,
    edit_metadata,
    plain_params,
    restore,
    save,
    save_plain,
)
from payloads import random_weights

import df11_jax
from df11_jax import _layout
from df11_jax._layout import make_layout


def flip_a_bit(folder, data):
    """Changes one bit of what is stored as `data`, which has to be long enough to be unique."""
    middle = data[len(data) // 2 :][:64]
    (file,) = [
        file
        for file in pathlib.Path(folder).rglob("*")
        if file.is_file() and middle in file.read_bytes()
    ]
    content = bytearray(file.read_bytes())
    content[content.index(middle) + 5] ^= 16
    file.write_bytes(content)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x"
    save(path, compressed_params())
    return path


@pytest.mark.parametrize("part", ["exponents", "sign_mantissa"])
def test_damaged_payload(saved, part):
    flip_a_bit(saved, np.asarray(getattr(compressed_params()["layers"]["up"], part)).tobytes())
    with pytest.raises(
        ValueError, match=r"x: damaged, checksums differ: layers/up has \w{8}, expected \w{8}\. "
    ):
        restore(saved)
    with pytest.raises(ValueError, match="layers/up has"):
        restore(saved, decompress=True)
    # Nothing but the damaged leaf is affected.
    part = {"head": compressed_params()["head"]}
    assert_same_tree(restore(saved, part, partial_restore=True), part)


def test_damaged_plain_leaf(tmp_path):
    params = {"small": jnp.arange(1000.0), "number": 3}
    save(tmp_path / "x", params)
    flip_a_bit(tmp_path / "x", np.asarray(params["small"]).tobytes())
    with pytest.raises(ValueError, match="small has"):
        restore(tmp_path / "x")


def test_verification_can_be_left_out(saved):
    small = compressed_params()
    flip_a_bit(saved, np.asarray(small["layers"]["up"].sign_mantissa).tobytes())
    back = restore(saved, verify=False)
    differing = np.asarray(back["layers"]["up"].sign_mantissa) != np.asarray(
        small["layers"]["up"].sign_mantissa
    )
    assert differing.sum() == 1
    # The decoder has checksums of its own, of the weights.
    either = (jax.errors.JaxRuntimeError, ValueError)  # the latter where jax had it compiled
    with pytest.raises(either, match=r"DATA_LOSS.*layers/up.*corrupt"):
        restore(saved, verify=False, decompress=True)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels of GPUs raise no errors")
@pytest.mark.parametrize("rows", [256, 8192])  # decoded at once, and while others are dispatched
@pytest.mark.parametrize("to_host", [False, True])
def test_what_was_corrupt_when_it_was_saved(tmp_path, rows, to_host):
    """Its checksum fits, and leaves of one form share a program, which has no path."""
    small = df11_jax.compress(random_weights((rows, 512)))
    exponents = np.array(small.exponents)
    exponents[len(exponents) // 2] ^= 0x5A5A
    bad = dataclasses.replace(small, exponents=jnp.asarray(exponents))
    params = {"good": small, "layers": {"bad": bad}}
    save(tmp_path / "x", jax.tree.map(np.asarray, params) if to_host else params)
    either = (jax.errors.JaxRuntimeError, ValueError)
    with pytest.raises(either, match=r"DATA_LOSS.*corrupt") as caught:
        restore(tmp_path / "x", decompress=True)
    assert "df11_jax: while decompressing the leaf layers/bad" in caught.value.__notes__


# Where reading an array fails, Orbax and TensorStore leave other reads behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lost", [True, False])
def test_lost_and_truncated_file(saved, lost):
    largest = max((saved / "ocdbt.process_0" / "d").iterdir(), key=lambda f: f.stat().st_size)
    if lost:
        largest.unlink()
    else:
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(Exception, match=r"(DATA_LOSS|OUT_OF_RANGE): Error reading"):
        restore(saved)
    gc.collect()


def test_another_format(saved, tmp_path):
    edit_metadata(saved, lambda data: data.update(format="other"))
    with pytest.raises(ValueError, match=r"names the format 'other', expected 'df11_jax\.orbax'"):
        restore(saved)
    with pytest.raises(FileNotFoundError, match="not found"):
        restore(tmp_path / "nothing")
    shutil.rmtree(saved)
    saved.mkdir()
    (saved / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(FileNotFoundError, match="_METADATA"):
        restore(saved)


@pytest.mark.parametrize("field", ["version", "layout_version"])
def test_newer_version(saved, field):
    edit_metadata(saved, lambda data: data.update({field: 3}))
    with pytest.raises(ValueError, match=f"has {field} 3, this version .* update df11_jax"):
        restore(saved)


def test_newer_version_in_a_header(tmp_path):
    """Of a leaf that Orbax alone has saved, nothing else says it."""
    small = compressed_params()
    header = small["embedding"].header.at[0].set(3)
    small["embedding"] = jax.tree.unflatten(
        jax.tree.structure(small["embedding"]), [header, *small["embedding"].payload[1:]]
    )
    save_plain(tmp_path / "x", small)
    with pytest.raises(ValueError, match="x: embedding: format version 3 is unknown"):
        restore(tmp_path / "x")


@pytest.mark.parametrize("noise", [np.uint32(0xFFFFFFFF), np.uint32(1)])
def test_headers_of_noise(tmp_path, noise):
    small = {"w": df11_jax.compress(plain_params()["embedding"])}
    header = jnp.full(_layout.HEADER_WORDS, noise)
    small["w"] = jax.tree.unflatten(
        jax.tree.structure(small["w"]), [header, *small["w"].payload[1:]]
    )
    save_plain(tmp_path / "x", small)
    with pytest.raises(ValueError, match="x: w: "):
        restore(tmp_path / "x")


def test_header_that_disagrees_with_the_metadata(tmp_path):
    small = compressed_params()
    save(tmp_path / "x", small)

    def swap(data):
        (entry,) = [leaf for leaf in data["leaves"] if leaf["path"] == "embedding"]
        entry["shape"] = entry["layout"]["shape"] = [128, 200]

    edit_metadata(tmp_path / "x", swap)
    # What the arrays' lengths do not show, the header does.
    with pytest.raises(
        ValueError,
        match=r"embedding: (its header says .* \[200, 128\], expected \[128, 200\]|sign)",
    ):
        restore(tmp_path / "x")


def test_layout_that_disagrees_with_the_header(saved):
    """Which is as long as the right one, so that only the header shows it."""

    def change(data):
        (entry,) = [leaf for leaf in data["leaves"] if leaf["path"] == "layers/up"]
        entry["layout"]["code_bits"] = 11

    edit_metadata(saved, change)
    with pytest.raises(
        ValueError, match=r"layers/up: its header says Layout\(.*code_bits=12.*code_bits=11"
    ):
        restore(saved)


def test_saving_what_does_not_fit_together(tmp_path):
    small = compressed_params()["embedding"]
    for shape in ((128, 200), (100, 256)):
        wrong = df11_jax.DF11Array.from_payload(small.payload, make_layout(shape))
        with pytest.raises(ValueError, match="a/b: "):
            save(tmp_path / "x", {"a": {"b": wrong}})
    assert not (tmp_path / "x").exists()


def remove_leaf(data):
    (i,) = [i for i, leaf in enumerate(data["leaves"]) if leaf["path"] == "embedding"]
    data["leaves"].pop(i)
    data["containers"]["dict"] = [
        [key, child] for key, child in data["containers"]["dict"] if key != "embedding"
    ]

    def renumber(node):
        if isinstance(node, int):
            return node - (node > i)
        if node is None:
            return None
        return {
            kind: [[key, renumber(child)] for key, child in content]
            for kind, content in node.items()
        }

    data["containers"] = renumber(data["containers"])


def add_leaf(data):
    data["containers"]["dict"].append(["more", len(data["leaves"])])
    leaf = {"path": "more", "shape": [3], "dtype": "float32", "shardings": [None]}
    data["leaves"].append(leaf)


def add_compressed_leaf(data):
    add_leaf(data)
    data["leaves"][-1] |= {
        "dtype": "bfloat16",
        "layout": make_layout((3,)).to_json(),
        "exponent_words": 8,
        "shardings": [None] * 5,
    }


def test_extra_and_missing_leaves(saved):
    before = (saved / "_METADATA").read_text()
    edit_metadata(saved, remove_leaf)
    with pytest.raises(ValueError, match=r"does not name: \['embedding/exponents'"):
        restore(saved)
    (saved / "_METADATA").write_text(before)
    edit_metadata(saved, add_leaf)
    with pytest.raises(ValueError, match="x: more: the checkpoint lacks this leaf"):
        restore(saved)
    (saved / "_METADATA").write_text(before)
    edit_metadata(saved, add_compressed_leaf)
    with pytest.raises(ValueError, match="x: more: the checkpoint lacks its tables, exponents"):
        restore(saved)


def test_arrays_of_other_lengths(saved):
    def change(data):
        (entry,) = [leaf for leaf in data["leaves"] if leaf["path"] == "layers/up"]
        entry["shape"], entry["layout"]["shape"] = [3, 128, 256], [128, 256]

    edit_metadata(saved, change)
    with pytest.raises(
        ValueError, match=r"up: sign_mantissa: uint32\[3,6144\] is stored, .* uint32\[3,8192\]"
    ):
        restore(saved)


def test_plain_leaf_of_another_shape(saved):
    def change(data):
        (entry,) = [leaf for leaf in data["leaves"] if leaf["path"] == "layers/norm"]
        entry["shape"] = [3, 64]

    edit_metadata(saved, change)
    with pytest.raises(ValueError, match=r"bfloat16\[3,128\] is stored, expected bfloat16\[3,64\]"):
        restore(saved)


def test_orbax_has_no_checksums(tmp_path):
    """What this package adds: Orbax alone restores damaged weights without a word."""
    params = {"w": jnp.asarray(np.random.default_rng(0).integers(2**31, size=10000))}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(tmp_path / "x", args=ocp.args.PyTreeSave(params))
        flip_a_bit(tmp_path / "x", np.asarray(params["w"]).tobytes())
        args = ocp.args.PyTreeRestore(
            params, restore_args=ocp.checkpoint_utils.construct_restore_args(params)
        )
        assert (checkpointer.restore(tmp_path / "x", args=args)["w"] != params["w"]).sum() == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"tree_metadata"', '"\\ud800"'),
        lambda text: text.replace('"key_type"', '"other"'),
        lambda text: text.replace('"value_type"', '"other"'),
        lambda text: "[" * 100_000,
    ],
)
def test_metadata_that_orbax_cannot_read(saved, change):
    """Orbax raises KeyError, TypeError and more, which do not say of which file."""
    file = saved / "_METADATA"
    file.write_text(change(file.read_text().replace('"df11_jax"', '"other"')))
    said = "(Orbax cannot read it, it|_METADATA) is damaged"
    with pytest.raises(ValueError, match=f"{saved}: {said}") as raised:
        restore(saved)
    str(raised.value).encode()


def test_metadata_that_is_no_text(saved):
    file = saved / "_METADATA"
    file.write_bytes(b"\xff" + file.read_bytes())
    with pytest.raises(ValueError, match=f"{saved}: _METADATA is damaged"):
        restore(saved)


def test_compressed_leaves_without_a_manifest_are_not_taken_for_dicts(saved):
    file = saved / "_METADATA"
    file.write_text(file.read_text().replace('{"df11_jax"', '{"df12_jax"'))
    with pytest.raises(
        ValueError, match=r"x: embedding: is a compressed leaf, of which .* damaged"
    ):
        restore(saved)


@pytest.mark.parametrize("shape", [[2**62, 0], [-1], [1.0], [2**80]])
def test_shapes_that_no_array_has(saved, shape):
    edit_metadata(saved, lambda data: data["leaves"][-1].update(shape=shape))
    with pytest.raises(ValueError, match=r"x: the metadata of df11_jax is damaged .*shape"):
        restore(saved)


def test_a_text_in_the_place_of_an_array(tmp_path):
    path = tmp_path / "x"
    save(path, {"a": np.ones(()), "b": "text"})
    file = path / "_METADATA"
    file.write_text(file.read_text().replace('"np.ndarray"', '"string"'))
    (path / "_strings.json").write_text('{"a": "1.0", "b": "text"}')
    with pytest.raises(ValueError, match=r"x: a: '1\.0' is stored, expected float64\[\]"):
        restore(path)
