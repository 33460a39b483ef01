import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.flax import save_file

from df11_jax._files.safetensors import DTYPES, Tensor, TensorFile, TensorWriter, header_room

ARRAYS = {
    name: np.arange(3 * 5 * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(3, 5)
    for name, dtype in DTYPES.items()
    if name != "BOOL"
} | {
    "BOOL": np.array([True, False, True]),
    "scalar": np.array(1.5, np.float32),
    "empty": np.empty((0, 4), ml_dtypes.bfloat16),
    'a name: "quoted", ä/b\n': np.arange(9, dtype=np.uint8),
}


def write(path, arrays, metadata=None):
    room = header_room(((name, array.ndim) for name, array in arrays.items()), metadata)
    with open(path, "wb") as file:
        writer = TensorWriter(file, room, metadata)
        for name, array in arrays.items():
            writer.add(Tensor.of(name, array))
        writer.finish()


def same_bits(actual, expected):
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and actual.tobytes() == expected.tobytes()
    )


def test_round_trip_of_all_dtypes(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, ARRAYS, {"format": "pt", "other": "x" * 999})
    file = TensorFile(path)
    assert file.metadata == {"format": "pt", "other": "x" * 999}
    assert list(file.entries) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert same_bits(file.array(name), array), name
        assert not file.array(name).flags.writeable or not array.size


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {name: array for name, array in ARRAYS.items() if name != "F8_E8M0"}
    write(path, arrays, {"format": "pt"})
    with safetensors.safe_open(path, framework="flax") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"format": "pt"}
        for name in ("BF16", "F32", "U8", "scalar", "empty"):
            assert same_bits(np.asarray(file.get_tensor(name)), arrays[name])


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {name: ARRAYS[name] for name in ("BF16", "F16", "F32", "I32", "U8", "BOOL", "empty")}
    save_file({k: jnp.asarray(v) for k, v in arrays.items()}, path, metadata={"a": "b"})
    file = TensorFile(path)
    assert file.metadata == {"a": "b"}
    assert set(file.entries) == set(arrays)
    for name, array in arrays.items():
        assert same_bits(file.array(name), array), name


def test_arrays_need_neither_alignment_nor_the_open_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"one": np.ones(1, np.uint8), "weights": np.arange(5, dtype=np.uint64)})
    array = TensorFile(path).array("weights")
    path.unlink()
    assert array.flags.aligned
    np.testing.assert_array_equal(array, np.arange(5, dtype=np.uint64))


def test_dtypes_without_a_name(tmp_path):
    with pytest.raises(ValueError, match="w: safetensors files cannot hold the dtype int4"):
        write(tmp_path / "a", {"w": np.zeros(2, ml_dtypes.int4)})


def container(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file, or is truncated"),
        (b"1234567", "is not a safetensors file, or is truncated"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "its header would have 4,611,686"),
        (container(b"[" * 100_000), "its header is not JSON"),
        (container(b"\xff\xfe"), "its header is not JSON"),
        (container([]), "its header is not a JSON object"),
        (container({"__metadata__": [1]}), "__metadata__ is"),
        (container({"__metadata__": {"a": 1}}), "__metadata__ is .* of strings"),
        (container(b'{"w": 1, "w": 2}'), "'w' is there twice"),
        (container(b'{"\\ud800": 1}'), "its header is not JSON .*surrogates not allowed"),
        (container(b'{"\xed\xa0\x80": 1}'), "its header is not JSON .*surrogates not allowed"),
        (container({"w" * 1001: entry()}, b"1234"), "a name of 1,001 characters"),
        (container({"w": entry(shape=(2**62, 0), offsets=(0, 0))}), "which no array can have"),
        (container({"w": 1}), "w: its header entry is 1"),
        (container({"w": entry(dtype=8)}), "w: dtype is 8"),
        (container({"w": entry(shape=(-4,))}), "w: shape is"),
        (container({"w": entry(shape=(True,))}), "w: shape is"),
        (container({"w": entry(shape=(1 << 63,))}), "w: shape is"),
        (container({"w": entry(shape=(1,) * 65)}), "w: shape is"),
        (container({"w": entry(offsets=(0,))}), "w: data_offsets are"),
        (container({"w": entry(offsets=(4, 0))}), "w: data_offsets are"),
        (container({"w": entry(shape=(5,))}, b"1234"), "w: data_offsets span 4 bytes"),
        (container({"w": entry("BF16", (4,))}, b"1234"), "w: data_offsets span 4 bytes"),
        (container({"w": entry()}, b"123"), "it is truncated"),
        (container({"w": entry()}, b"12345"), "something was appended to it"),
        (
            container({"w": entry(), "v": entry(offsets=(3, 7))}, b"1234567"),
            "v: data_offsets begin at 3, expected 4",
        ),
        (
            container({"w": entry(), "v": entry(offsets=(5, 9))}, b"123456789"),
            "v: data_offsets begin at 5, expected 4",
        ),
    ],
)
def test_bad_headers(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors: .*" + message):
        TensorFile(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "directory.safetensors").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path}: is a directory, pipe or device"):
            TensorFile(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        TensorFile(tmp_path / "nothing.safetensors")


def test_names_that_are_too_long(tmp_path):
    write(tmp_path / "a", {"w" * 1000: np.zeros(2, np.uint8)})
    with pytest.raises(ValueError, match=r"www\.\.\.: a name of 1,001 characters"):
        write(tmp_path / "a", {"w" * 1001: np.zeros(2, np.uint8)})


def test_of_unknown_dtypes_the_bytes_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(container({"w": entry("F4", (8,))}, b"1234"))
    file = TensorFile(path)
    assert file.entries["w"].nbytes == 4
    assert same_bits(file.array("w"), np.frombuffer(b"1234", np.uint8))


def test_a_file_that_became_shorter(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": np.zeros(100_000, np.uint8)})
    file = TensorFile(path)
    with open(path, "r+b") as opened:
        opened.truncate(50_000)
    with pytest.raises(ValueError, match=r"a\.safetensors: was changed while it was read"):
        file.array("w")


@given(st.data())
def test_damaged_headers_are_errors_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write(path, {"a": np.zeros((2, 3), np.uint16), "b": np.zeros(5, np.uint8)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = TensorFile(path)
        for name in file.entries:
            file.array(name).sum()
    except ValueError as error:
        assert str(path) in str(error)
