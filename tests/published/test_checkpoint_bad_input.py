import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import LAYER, ORIGINAL, SHARDED, copy_sharded, edit, load, original, save

from df11_jax import checkpoints, published
from df11_jax._files.directory import JOURNAL
from df11_jax.published._headers import PARTS

SHARD = "model_layers_0.safetensors"


def read_all(path, shapes=None):
    checkpoint = published.Checkpoint(path, shapes)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def assert_refused(path, *parts):
    """Opening or reading raises an error that says all of this, in this order."""
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        read_all(path)


def change_part(tmp_path, part, change):
    path = copy_sharded(tmp_path)

    def apply(tensors):
        tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"])

    edit(path / SHARD, apply)
    return path


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_shard(tmp_path, keep):
    path = copy_sharded(tmp_path)
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[:keep])
    assert_refused(path, SHARD, "download or write it again")


@pytest.mark.parametrize("change", [-8, 8, 2**40, 2**62])
def test_wrong_header_length(tmp_path, change):
    path = copy_sharded(tmp_path)
    data = (path / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little") + change
    (path / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
    assert_refused(path, SHARD, "download")


def test_more_than_the_header_says(tmp_path):
    path = copy_sharded(tmp_path)
    with open(path / SHARD, "ab") as file:
        file.write(b"\0")
    assert_refused(path, SHARD)


@pytest.mark.parametrize("part", PARTS)
def test_missing_part(tmp_path, part):
    path = copy_sharded(tmp_path)
    edit(path / SHARD, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    assert_refused(path, SHARD, f"unit {LAYER}: {part} is missing")


@pytest.mark.parametrize("part", PARTS)
def test_wrong_type(tmp_path, part):
    path = change_part(tmp_path, part, lambda array: array.astype(np.int16))
    expected = "I64" if part == "split_positions" else "U8"
    assert_refused(path, SHARD, f"unit {LAYER}: {part} is I16", f"expected {expected}")


@pytest.mark.parametrize("part", PARTS)
def test_wrong_dimensions(tmp_path, part):
    path = change_part(tmp_path, part, lambda array: array[None])
    assert_refused(path, SHARD, f"unit {LAYER}: {part} is", "expected", "dimension(s)")


@pytest.mark.parametrize(
    ("part", "change", "messages"),
    [
        ("encoded_exponent", lambda a: a[:1000], ["U8[1000], expected 3840 to 122881 bytes"]),
        ("encoded_exponent", lambda a: np.resize(a, 200_000), ["U8[200000], expected 3840 to"]),
        ("encoded_exponent", lambda a: np.resize(a, len(a) + 8192), ["output_positions is"]),
        ("luts", lambda a: a[-1:], ["luts is U8[1, 256], expected U8[2 or more, 256]"]),
        ("luts", lambda a: a[:, :255], ["luts is"]),
        ("output_positions", lambda a: a[:-8], ["output_positions is U8[8], expected 16 or 12"]),
        ("output_positions", lambda a: a[:-1], ["output_positions is"]),
        ("output_positions", lambda a: np.append(a, a[-4:]), ["output_positions is"]),
        ("gaps", lambda a: a[:-1], ["gaps is U8[959], expected 960 bytes"]),
        ("gaps", lambda a: np.append(a, a[:320]), ["gaps is"]),
        ("split_positions", lambda a: a[::-1].copy(), ["split_positions is [24576", "ascending"]),
        ("split_positions", lambda a: a + 2**40, ["split_positions is", "up to 30720"]),
        ("split_positions", lambda a: -a, ["split_positions is [-4096"]),
        ("split_positions", lambda a: np.append(a, a[-1]), ["split_positions makes it 8 tensors"]),
        ("split_positions", lambda a: a[:0], ["split_positions makes it 1 tensors", "it is 7"]),
        ("split_positions", lambda a: a + 1, ["self_attn.q_proj.weight: its shape", "[64, 64]"]),
        ("sign_mantissa", lambda a: a[:-1], ["mlp.down_proj.weight: its shape", "has 6143"]),
    ],
)
def test_headers_that_do_not_fit(tmp_path, part, change, messages):
    assert_refused(change_part(tmp_path, part, change), SHARD, f"unit {LAYER}", *messages)


def lengthen_codes(length):
    def change(luts):
        luts = luts.copy()
        luts[-1, luts[-1] > 0] = length
        return luts

    return change


def fill(value):
    def change(luts):
        luts = luts.copy()
        luts[:-1] = value
        return luts

    return change


def swap(array):
    array = array.copy().view(np.uint32)
    array[[1, 2]] = array[[2, 1]]
    return array.view(np.uint8)


def count_one_more(array):
    array = array.copy().view(np.uint32)
    array[-1] += 1
    return array.view(np.uint8)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("luts", lengthen_codes(0)),
        ("luts", lengthen_codes(33)),
        ("luts", fill(255)),  # row 1 points to itself
        ("luts", fill(240)),  # a row that is not there
        ("output_positions", swap),
        ("output_positions", count_one_more),
        ("gaps", lambda a: np.full_like(a, 255)),
    ],
)
def test_corrupt_content(tmp_path, part, change):
    path = change_part(tmp_path, part, change)
    checkpoint = published.Checkpoint(path)
    message = rf"{SHARD}: unit {re.escape(LAYER)}: .*download"
    with pytest.raises(ValueError, match=message):
        for name in checkpoint.units[LAYER].tensors:
            checkpoint.read(name)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(checkpoint)
    checkpoint.read("lm_head.weight")


def test_the_same_tensor_twice(tmp_path):
    path = copy_sharded(tmp_path)
    rest = load(path / "model.safetensors")
    save(path / "zoo.safetensors", rest)
    assert_refused(path, "zoo.safetensors: model.norm.weight: is in", "model.safetensors, too")
    (path / "zoo.safetensors").unlink()
    save(path / "model.safetensors", rest | {"lm_head.weight": rest["model.norm.weight"]})
    assert_refused(path, "lm_head.weight: is there twice")


def test_missing_layer(tmp_path):
    path = copy_sharded(tmp_path)
    (path / "model_layers_1.safetensors").unlink()
    assert_refused(path, "there is no tensor of layer 1")
    # The rest can still be read, file by file.
    assert LAYER in published.Checkpoint(path / SHARD).units


@pytest.mark.parametrize(
    ("file", "part"),
    [("lm_head", "lm_head"), ("model_embed_tokens", "embed_tokens"), ("model", "norm")],
)
def test_missing_files(tmp_path, file, part):
    path = copy_sharded(tmp_path)
    (path / f"{file}.safetensors").unlink()
    assert_refused(path, f"there is no tensor of {part}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads_per_block": [256]}, "threads_per_block is [256]; only [512]"),
        ({"bytes_per_thread": 4}, "bytes_per_thread is 4; only 8"),
        ({"pattern_dict": None}, "pattern_dict is None"),
        ({"pattern_dict": {"a": "b"}}, "'a': expected a list"),
        ({"pattern_dict": {"a": [1]}}, "'a': expected a list"),
        ({"pattern_dict": {"(": []}}, "'(' is not a regular expression"),
        ({"pattern_dict": {"(a+)+b": []}}, "config.json: dfloat11_config: pattern_dict: '(a+)+b'"),
        ({"pattern_dict": {"a" * 5000: []}}, "of 5,000 characters, expected up to 4,000"),
        ({"pattern_dict": {"lm_head": []}}, f"unit {LAYER}: which 7 tensors"),
        ({"pattern_dict": {".*": ["a", "b"]}}, "unit lm_head: split_positions makes it 1"),
    ],
)
def test_bad_dfloat11_config(tmp_path, change, message):
    path = copy_sharded(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["dfloat11_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: is not"),
        ("\0", "config.json: is not"),
        ("[" * 100_000, "config.json: is not"),
        ("[]", "config.json: expected a JSON object"),
        ('{"dfloat11_config": []}', "config.json: dfloat11_config: is []"),
    ],
)
def test_bad_config(tmp_path, text, message):
    path = copy_sharded(tmp_path)
    (path / "config.json").write_text(text)
    assert_refused(path, message)


def test_version_does_not_matter(tmp_path):
    path = copy_sharded(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["dfloat11_config"]["version"] = "9"
    (path / "config.json").write_text(json.dumps(config))
    read_all(path)


@pytest.mark.parametrize("name", ["model.pkl", "model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": list(range(1000))}))
    assert_refused(tmp_path, name, "is a pickle", "before version 0.2", "safetensors")
    assert_refused(tmp_path / name, name, "is a pickle")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_are_refused_by_content(tmp_path, protocol):
    (tmp_path / "model").write_bytes(pickle.dumps({"a": list(range(1000))}, protocol))
    assert_refused(tmp_path / "model", "model: is a pickle")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        published.Checkpoint(tmp_path / "nothing")
    assert_refused(tmp_path, "there are no *.safetensors files")
    assert_refused(ORIGINAL, "holds no compressed unit")
    path = copy_sharded(tmp_path)
    (path / JOURNAL).touch()
    assert_refused(path, "is incomplete")


def test_a_file_that_changes_while_it_is_open(tmp_path):
    path = copy_sharded(tmp_path)
    checkpoint = published.Checkpoint(path)
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"{SHARD}: was changed while it was read"):
        checkpoint.read(f"{LAYER}.mlp.down_proj.weight")
    (path / "lm_head.safetensors").unlink()
    assert checkpoint.read("lm_head.weight").tobytes() == original()["lm_head.weight"].tobytes()


def test_types_that_numpy_lacks(tmp_path):
    path = copy_sharded(tmp_path)
    header = {"x": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    checkpoint = published.Checkpoint(path)
    assert checkpoint.tensors["x"].shape == (16,)
    assert checkpoint.read("x").tobytes() == bytes(8)
    with pytest.raises(ValueError, match="x: has the dtype F4, which numpy lacks"):
        checkpoints.load(path)


# A unit, in a file of 10 kB.
_SMALL = (SHARDED / "lm_head.safetensors").read_bytes()
_HEADER = 8 + int.from_bytes(_SMALL[:8], "little")
_DAMAGE = st.lists(
    st.tuples(
        st.one_of(st.integers(0, _HEADER - 1), st.integers(0, len(_SMALL) - 1)),
        st.integers(1, 255),
    ),
    max_size=4,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damage=_DAMAGE, keep=st.one_of(st.none(), st.integers(0, len(_SMALL))))
def test_damaged_files(tmp_path, damage, keep):
    data = bytearray(_SMALL)
    for at, mask in damage:
        data[at] ^= mask
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[:keep])
    try:
        checkpoint = published.Checkpoint(path, {"lm_head.weight": (96, 64)})
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
        for unit in checkpoint.units:
            published.decompress(checkpoint.read_unit(unit))
    except ValueError as error:
        assert str(path) in str(error)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 1000), byte=st.integers(0, 255))
def test_damaged_config(tmp_path, at, byte):
    path = tmp_path / "model"
    if not path.exists():
        copy_sharded(tmp_path)
    text = bytearray((SHARDED / "config.json").read_bytes())
    text[at] = byte
    (path / "config.json").write_bytes(text)
    try:
        read_all(path)
    except ValueError as error:
        assert str(path) in str(error) or "config" in str(error)
