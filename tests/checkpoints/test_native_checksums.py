import json
import os
import shutil
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from click.testing import CliRunner
from payloads import random_weights
from safetensors.flax import save_file

import df11_jax
from df11_jax import _layout, checkpoints
from df11_jax._files.safetensors import TensorFile
from df11_jax.checkpoints._native_format import METADATA
from df11_jax.checkpoints.convert import write_plain
from df11_jax.cli import _commands

INDEX = "model.safetensors.index.json"


def params(seed=0):
    return {
        # 250 rows of 64 are as many chunks as 251: the header alone says how many there are.
        "w": df11_jax.compress(random_weights((250, 64), seed)),
        "stack": df11_jax.compress(random_weights((2, 64, 64), seed + 1), stack_axes=1),
        "norm": random_weights((33,), seed + 2),
        "odd": np.arange(3, dtype=np.uint8) + seed,
        "scalar": jnp.float32(seed),
        "empty": jnp.zeros((0, 4)),
    }


def read_all(path):
    """What the commands see, and what `load` gives."""
    source = checkpoints.open_checkpoint(path)
    checkpoints.load(source)
    return {name: (source.tensors[name], source.read(name).tobytes()) for name in source.tensors}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoints.save(params(), path)
    return path


def parts_of(file):
    """Where in a file each tensor lies."""
    opened = TensorFile(file)
    begin = file.stat().st_size - max(entry.end for entry in opened.entries.values())
    return {name: (begin + e.begin, begin + e.end) for name, e in opened.entries.items()}


def test_are_as_specified(file):
    with safetensors.safe_open(file, framework="flax") as opened:  # other programs can read it
        metadata = opened.metadata()
        assert set(metadata) == set(METADATA) | {
            f"crc32:{name}" for name in opened.keys() if not name.endswith(":sign_mantissa")
        }
        norm, header = opened.get_tensor("norm"), opened.get_tensor("w:header")
    for name, text in (
        ("norm", b"norm\nBF16\n33\n" + np.asarray(norm).tobytes()),
        ("w:header", b"w:header\nU32\n28\n" + np.asarray(header).tobytes()),
        ("scalar", b"scalar\nF32\n\n" + bytes(4)),
        ("empty", b"empty\nF32\n0,4\n"),
    ):
        assert metadata[f"crc32:{name}"] == f"{zlib.crc32(text):08x}"


def test_each_bit_of_a_plain_leaf(file):
    begin, end = parts_of(file)["norm"]
    content = bytearray(file.read_bytes())
    for bit in range(8 * begin, 8 * end):
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=rf"{file}: norm: is corrupt: the CRC-32 .* is \w{{8}}, expected \w{{8}}\.",
        ):
            checkpoints.open_checkpoint(file).read("norm")
        content[bit // 8] ^= 1 << bit % 8
    content[begin] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="norm: is corrupt"):
        checkpoints.load(file)
    result = CliRunner().invoke(_commands.commands, ["verify", str(file), str(file)])
    assert result.exit_code == 2
    assert f"{file}: norm: is corrupt" in result.output


@pytest.mark.parametrize("part", ["header", "codebook", "chunk_offsets"])
def test_short_parts_of_compressed_leaves(file, part):
    content = bytearray(file.read_bytes())
    content[parts_of(file)[f"w:{part}"][0] + 8] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"w:{part}: is corrupt"):
        checkpoints.load(file)


def test_a_header_of_as_many_chunks(file):
    """Without a checksum, a row more or less would go unnoticed."""
    content = bytearray(file.read_bytes())
    begin, _ = parts_of(file)["w:header"]
    other = _layout.pack_header(_layout.make_layout((251, 64)))[: _layout.CODEBOOK_ID].tobytes()
    assert _layout.unpack_header(np.frombuffer(content, np.uint32, 28, begin)).shape == (250, 64)
    content[begin : begin + len(other)] = other
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: w:header: is corrupt"):
        checkpoints.open_checkpoint(file)


def test_bits_of_the_header(file):
    """Names, shapes, dtypes, offsets and checksums: nothing can change and still be believed."""
    expected = read_all(file)
    content = bytearray(file.read_bytes())
    end = min(begin for begin, _ in parts_of(file).values())
    for bit in range(0, 8 * end, 13):
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            assert read_all(file) == expected  # blanks
        except ValueError as error:
            assert str(file) in str(error)
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"BF16","shape":[33]', b'"dtype":"F16", "shape":[33]'),
        (b'"dtype":"BF16","shape":[33]', b'"dtype":"BF16","shape":[3,11]'),
        (b'"norm":{"dtype"', b'"form":{"dtype"'),
        (b'"crc32:norm"', b'"crc32:form"'),
        (b'"crc32:norm"', b'"crc33:norm"'),
        (b'"format":"df11_jax"', b'"format":"df12_jax"'),
        (b'"version":"2"', b'"version":"3"'),
    ],
)
def test_changes_of_the_header(file, old, new):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    assert header.count(old) == 1
    header = header.replace(old, new)[:length].ljust(length)
    file.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(ValueError, match=f"^{file}: "):
        read_all(file)


def test_files_without_checksums_load(tmp_path):
    """As they were written before there were any."""
    tree = params()
    parts = ("header", "codebook", "chunk_offsets", "exponents", "sign_mantissa")
    tensors = {f"w:{name}": part for name, part in zip(parts, tree["w"].payload, strict=True)}
    path = tmp_path / "old.safetensors"
    save_file(tensors | {"norm": tree["norm"]}, path, metadata=METADATA)
    checkpoints.save({"w": tree["w"], "norm": tree["norm"]}, tmp_path / "new.safetensors")
    assert read_all(path) == read_all(tmp_path / "new.safetensors")


@pytest.mark.parametrize("name", ["w:sign_mantissa", "norm"])
def test_what_is_native_is_not_taken_for_plain(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_file({name: jnp.zeros(2)}, path, metadata={"crc32:norm": "00000000"})
    with pytest.raises(ValueError, match=r"a\.safetensors: .*(expected|corrupt)"):
        checkpoints.load(path)


@pytest.fixture
def directories(tmp_path):
    """Two of the same names and shapes, all plain, so that only checksums can tell."""
    for seed in (0, 1):
        tree = {f"layer{i}": jnp.arange(40.0) + seed for i in range(3)}
        checkpoints.save(tree, tmp_path / str(seed), max_shard_size=100)
    return tmp_path / "0", tmp_path / "1"


def test_shards_of_another_save(directories):
    first, second = directories
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))
    assert os.listdir(first) != [INDEX]
    shard = "model-00002-of-00003.safetensors"
    shutil.copy(second / shard, first / shard)
    with pytest.raises(
        ValueError,
        match=rf"{first / shard}: the CRC-32 of its header is \w{{8}}, {INDEX} expects '\w{{8}}'.* "
        "not of the same save",
    ):
        checkpoints.load(first)


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


def test_damage_to_the_index(directories):
    path, _ = directories
    before = (path / INDEX).read_text()

    def assert_refused(change, message):
        edit_index(path, change)
        with pytest.raises(ValueError, match=message):
            checkpoints.load(path)
        (path / INDEX).write_text(before)

    key, is_corrupt = "header_crc32", f"{path / INDEX}: is corrupt: header_crc32 is "
    assert_refused(lambda index: index["metadata"][key].popitem(), is_corrupt)
    assert_refused(lambda index: index["metadata"].update({key: 1}), is_corrupt)
    assert_refused(lambda index: index["weight_map"].pop("layer0"), is_corrupt)
    assert_refused(
        lambda index: index["metadata"][key].update(dict.fromkeys(index["metadata"][key], "1")),
        f"{INDEX} expects '1'",
    )
    edit_index(path, lambda index: index["metadata"].pop(key))  # as before there were any
    assert len(checkpoints.load(path)) == 3


def test_a_tensor_that_the_index_lacks(tmp_path):
    checkpoints.save({"a": jnp.zeros(1), "b": jnp.zeros(1)}, tmp_path / "x")
    edit_index(tmp_path / "x", lambda index: index["weight_map"].pop("b"))
    with pytest.raises(ValueError, match="x: the index does not list b of model-00001-of-00001"):
        checkpoints.load(tmp_path / "x")


def test_plain_checkpoints_get_none(directories, tmp_path):
    write_plain(checkpoints.open_checkpoint(directories[0]), tmp_path / "plain")
    shards = list((tmp_path / "plain").glob("*.safetensors"))
    assert len(shards) == 3
    assert all(TensorFile(shard).metadata == {"format": "pt"} for shard in shards)
    assert json.loads((tmp_path / "plain" / INDEX).read_text())["metadata"].keys() == {"total_size"}
