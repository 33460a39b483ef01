import dataclasses
import json

import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from native_files import save_unchecked

from df11_jax import checkpoints, compress
from df11_jax.checkpoints import open_checkpoint
from df11_jax.checkpoints.convert import write_native
from df11_jax.checkpoints.differences import differences

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def weights():
    return model_files.tensors()


def compare(tmp_path, a, b):
    sources = []
    for i, weights in enumerate((a, b)):
        path = model_files.write_model(tmp_path / "ab"[i], weights, shards=i + 1)
        sources.append(open_checkpoint(path))
    there = list(differences(*sources))
    back = list(differences(*sources[::-1]))
    assert bool(there) == bool(back)
    return there


def test_equal_in_all_formats(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
    plain = open_checkpoint(model_files.write_model(tmp_path / "plain", weights))
    write_native(plain, tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    assert list(differences(plain, native, progress=True)) == []
    assert "verify: 100%" in capsys.readouterr().err
    assert list(differences(native, plain)) == []


@pytest.mark.parametrize(
    ("name", "index", "shown"),
    [
        ("odd", (128, 126), "odd[128, 126]"),
        ("cube", (2, 0, 5), "cube[2, 0, 5]"),
        ("scalar", (), "scalar[]"),
    ],
)
def test_the_first_element_that_differs(tmp_path, weights, name, index, shown):
    changed = weights[name].copy()
    changed.view(np.uint16)[index] ^= 0x0180
    before = int(weights[name].view(np.uint16)[index])
    (found,) = compare(tmp_path, weights, weights | {name: changed})
    assert found == (
        f"{shown} is {before:#06x} in the first, {before ^ 0x0180:#06x} in the second; "
        f"1 of {changed.size:,} elements of this tensor differ"
    )


def test_every_bit_counts(tmp_path):
    nan, other_nan = np.array([0x7FC0, 0xFFC1], np.uint16)
    a = np.array([0, nan], np.uint16).view(jnp.bfloat16)
    assert compare(tmp_path / "nan", {"w": a}, {"w": a}) == []
    b = np.array([0x8000, other_nan], np.uint16).view(jnp.bfloat16)
    (found,) = compare(tmp_path / "zeros", {"w": a}, {"w": b})
    assert found.startswith("w[0] is 0x0000 in the first, 0x8000 in the second; 2 of 2 elements")


def test_behind_the_first_chunk(tmp_path):
    a = np.zeros((3, 1 << 20), np.uint8)
    b = a.copy()
    b[1, 7] = b[2, 9] = 255
    (found,) = compare(tmp_path, {"w": a}, {"w": b})
    assert found == (
        "w[1, 7] is 0x00 in the first, 0xff in the second; "
        "2 of 3,145,728 elements of this tensor differ"
    )


def test_all_names_shapes_and_dtypes_that_differ(tmp_path):
    a = {"x": np.zeros(4, np.float32), "y": np.zeros((2, 3), np.float32), "z": np.zeros(1, np.int8)}
    b = {"w": np.zeros(1), "x": np.ones(4, np.int32), "y": np.zeros((3, 2), np.float32)}
    found = compare(tmp_path, a, b)
    first, second = tmp_path / "a", tmp_path / "b"
    assert found == [
        f"z is in {first} only",
        f"w is in {second} only",
        f"x is F32[4] in {first}, I32[4] in {second}",
        f"y is F32[2, 3] in {first}, F32[3, 2] in {second}",
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_tied_lm_head(tmp_path, weights, tied, same):
    head = weights[EMBEDDING] if same else weights[EMBEDDING][::-1]
    sources = []
    for name, tensors in (("with", weights | {HEAD: head}), ("without", weights)):
        path = model_files.write_model(tmp_path / name, tensors)
        config = model_files.CONFIG | {"tie_word_embeddings": tied}
        (path / "config.json").write_text(json.dumps(config))
        sources.append(open_checkpoint(path))
    found, back = list(differences(*sources)), list(differences(*sources[::-1]))
    if not tied:
        assert found == back == [f"{HEAD} is in {tmp_path / 'with'} only"]
    elif same:
        assert found == back == []
    else:
        assert found[0].startswith(f"{HEAD} ({EMBEDDING} in {tmp_path / 'without'})[0, ")
        assert back[0].startswith(f"{EMBEDDING} ({HEAD} in {tmp_path / 'with'})[0, ")


def test_the_side_that_has_the_lm_head_does_not_say_what_is_tied(tmp_path, weights):
    path = model_files.write_model(tmp_path / "with", weights | {HEAD: weights[EMBEDDING]})
    (path / "config.json").write_text(
        json.dumps(model_files.CONFIG | {"tie_word_embeddings": True})
    )
    without = open_checkpoint(model_files.write_model(tmp_path / "without", weights))
    assert list(differences(open_checkpoint(path), without)) == [f"{HEAD} is in {path} only"]


def test_a_corrupt_tensor_is_an_error(tmp_path, weights):
    checkpoints.save({"w": jnp.asarray(weights["cube"])}, tmp_path / "plain.safetensors")
    bad = compress(weights["cube"])
    bad = dataclasses.replace(bad, codebook=jnp.zeros_like(bad.codebook))
    save_unchecked({"w": bad}, tmp_path / "bad.safetensors")
    sources = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("plain", "bad"))
    with pytest.raises(ValueError, match=r"bad\.safetensors: w: is corrupt"):
        list(differences(*sources))
