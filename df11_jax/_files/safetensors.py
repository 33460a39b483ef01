"""Safetensors files, read without copies and written as a stream.

The library of that name copies every tensor that it reads, and needs all tensors of a file in
memory before it writes any. A file consists of 8 bytes with the length of the header, the header as
JSON, and the tensors one after the other.
"""

import json
import math
import mmap
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from df11_jax._brief import brief
from df11_jax._files.opened_file import OpenedFile
from df11_jax._files.other_formats import START_BYTES, OtherFormatError, find_format
from df11_jax._files.untrusted_json import MAX_BYTES, parse_json
from df11_jax._host_arrays import as_bytes

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_METADATA = "__metadata__"  # the key in the header that is none of a tensor
_MAX_DIMS = 64  # the limit of numpy
# The limit of numpy for elements of 16 bytes, which holds for the dimensions other than 0.
_MAX_ELEMENTS = 2**59
# Longer than the name of any module; messages and nested dicts are made of names.
_MAX_NAME = 1000
# Of what numpy lacks, too; headers have room for names of that length.
_DTYPE = re.compile(r"[A-Za-z0-9_]{1,16}")
_ALIGNMENT = 64


class Entry(NamedTuple):
    """One tensor of a file: `begin` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Tensor(NamedTuple):
    """One tensor to be written.

    Attributes:
        name: the name of the tensor.
        dtype: its dtype, as the format names it.
        shape: its shape.
        array: the tensor; or, if numpy has no such dtype, its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    array: np.ndarray

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> "Tensor":
        """A tensor of a dtype that numpy has.

        Raises:
            ValueError: safetensors has no name for its dtype.
        """
        return cls(name, dtype_name(name, array.dtype), array.shape, array)


def dtype_name(name: str, dtype: Any) -> str:
    """The name of a dtype in safetensors files.

    Args:
        name: the name of the tensor, for messages.
        dtype: the dtype of the tensor.

    Raises:
        ValueError: it has no name.
    """
    known = DTYPE_NAMES.get(dtype)
    if known is None:
        # A key of JAX, which this module does without.
        hint = ": jax.random.key_data makes an array of it" if "key<" in str(dtype) else ""
        raise ValueError(f"{name}: safetensors files cannot hold the dtype {dtype}{hint}")
    return known


class TensorFile(OpenedFile):
    """A safetensors file, open for reading: its header is read and checked, the rest mapped.

    Attributes:
        path: the path of the file.
        metadata: the strings that its writer added to the header.
        entries: its tensors by name, in the order in which they lie in the file.
        header_crc32: the checksum of its header, as eight hexadecimal digits.
    """

    def __init__(self, path: Path, directory: int | None = None) -> None:
        """Reads the header.

        Args:
            path: the path of the file.
            directory: the descriptor of its directory; see `OpenedFile`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a safetensors file, or is truncated; the message names it.
        """
        super().__init__(path, directory)
        length = 0
        if self.nbytes >= _LENGTH_BYTES:
            length = int.from_bytes(self.read(_LENGTH_BYTES), "little")
        self._data_begin = _LENGTH_BYTES + length
        if length > MAX_BYTES or self._data_begin > self.nbytes:
            start = self.read(min(START_BYTES, self.nbytes))
            kind = "a JSON file, and no index" if start.startswith(b"{") else find_format(start)
            if kind is not None:
                raise OtherFormatError(f"{path}: is {kind}; expected a safetensors file")
            raise ValueError(
                f"{path}: is not a safetensors file, or is truncated: it has {self.nbytes:,} "
                f"bytes, and its header would have {length:,}"
            )
        header = self.read(length, _LENGTH_BYTES)
        self.header_crc32 = f"{zlib.crc32(header):08x}"
        try:
            self.metadata, self.entries = _parse(header, self.nbytes - self._data_begin)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def array(self, name: str) -> np.ndarray:
        """A tensor, as a read-only view of the mapped file.

        The view shows what is written to the file later, which `check_unchanged` notices. It does
        not depend on the path.

        Returns:
            The tensor; or, if numpy has no such dtype, its bytes.

        Raises:
            KeyError: there is no tensor of that name.
            OSError: the file cannot be mapped.
            ValueError: the file was changed since it was opened.
        """
        self.check_unchanged()
        entry = self.entries[name]
        dtype, shape = numpy_form(entry.dtype, entry.shape, entry.nbytes)
        if not entry.nbytes:
            return np.empty(shape, dtype)
        begin, mapped = self._data_begin + entry.begin, self.map()
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        # Encoders read tile by tile, in which the kernel would see no order to read ahead by.
        mapped.madvise(mmap.MADV_WILLNEED, page, begin + entry.nbytes - page)
        array = np.frombuffer(mapped, dtype, math.prod(shape), begin)
        # Nothing in the format aligns tensors to their own size.
        array = np.require(array, requirements="A").reshape(shape)
        array.flags.writeable = False
        return array


def numpy_form(dtype: str, shape: tuple[int, ...], nbytes: int) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape of the array by which a tensor is read and written.

    If numpy lacks the dtype, these are the tensor's bytes.
    """
    known = DTYPES.get(dtype)
    return (np.dtype(np.uint8), (nbytes,)) if known is None else (known, tuple(shape))


class TensorWriter:
    """Writes tensors to a safetensors file as they come.

    Room for the header is left in front, and filled by `finish`, with blanks at its end, which
    the format allows: so the sizes of compressed tensors need not be known before.

    Attributes:
        metadata: the strings for the header, to which more can be added as long as there is room.
    """

    def __init__(
        self, file: BinaryIO, room: int, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Begins a file.

        Args:
            file: empty, open for writing.
            room: the bytes to leave for the header, as `header_room` computes them.
            metadata: the strings to put into the header.
        """
        self._file = file
        self._data_begin = -(-(_LENGTH_BYTES + room) // _ALIGNMENT) * _ALIGNMENT
        self.metadata = dict(metadata or {})
        self._header: dict[str, Any] = {}
        self._end = 0
        file.seek(self._data_begin)

    def add(self, tensor: Tensor) -> None:
        """Appends a tensor."""
        self._file.write(as_bytes(tensor.array).data)
        begin, self._end = self._end, self._end + tensor.array.nbytes
        self._header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, self._end],
        }

    def finish(self) -> None:
        """Writes the header."""
        metadata = {_METADATA: self.metadata} if self.metadata else {}
        header = json.dumps(metadata | self._header, separators=(",", ":")).encode()
        length = self._data_begin - _LENGTH_BYTES
        assert len(header) <= length, "header_room was told of all tensors"
        self._file.seek(0)
        self._file.write(length.to_bytes(_LENGTH_BYTES, "little") + header.ljust(length))


def header_room(
    tensors: Iterable[tuple[str, int]], metadata: Mapping[str, str] | None = None
) -> int:
    """The bytes that suffice for the header of a file, which readers accept.

    Args:
        tensors: the name and the number of dimensions of each tensor that there may be.
        metadata: the strings for the header.

    Raises:
        ValueError: a file cannot hold a tensor of that name, or as many tensors.
    """
    number = 20  # digits of 2**64, and a comma
    fields = len('"":{"dtype":"","shape":[],"data_offsets":[]},') + 16
    room = len(json.dumps({_METADATA: dict(metadata or {})}))
    count = 0
    for name, ndim in tensors:
        check_name(name)
        room += len(json.dumps(name)) + fields + number * (ndim + 2)
        count += 1
    if room > MAX_BYTES:
        raise ValueError(
            f"{count:,} tensors need a header of up to {room:,} bytes, of which a safetensors file "
            f"can have {MAX_BYTES:,}; divide them among several files"
        )
    return room


def _parse(header: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and tensors of a header, everything in which is checked."""
    try:
        fields = parse_json(header, unique=True)
    except ValueError as error:
        raise ValueError(
            f"is not a safetensors file: its header is not JSON ({error!s:.200})"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError("is not a safetensors file: its header is not a JSON object")
    metadata = fields.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__ is {brief(metadata)}, expected a JSON object of strings")
    entries = {name: _parse_entry(name, entry) for name, entry in fields.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise ValueError(
                f"{name}: data_offsets begin at {entry.begin:,}, expected {end:,}, the end of the "
                "tensor before"
            )
        end = entry.end
    if end != data_bytes:
        raise ValueError(
            f"the tensors have {end:,} bytes by the header, the file has {data_bytes:,} for them: "
            + ("it is truncated" if data_bytes < end else "something was appended to it")
        )
    return metadata, entries


def check_shape(shape: Sequence[int], name: str) -> None:
    """Checks that there can be arrays of a shape.

    Raises:
        ValueError: there can be none.
    """
    if math.prod(max(1, n) for n in shape) >= _MAX_ELEMENTS:
        raise ValueError(f"{name}: shape is {brief(list(shape))}, which no array can have")


def check_name(name: str) -> None:
    """Checks that a tensor can have a name.

    Raises:
        ValueError: it cannot.
    """
    if len(name) > _MAX_NAME:
        raise ValueError(
            f"{name:.80}...: a name of {len(name):,} characters, expected up to {_MAX_NAME:,}"
        )
    if name == _METADATA:
        raise ValueError(f"{name}: safetensors files cannot hold a tensor of this name; rename it")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!a}: is no Unicode text, as names in files have to be") from None


def _parse_entry(name: str, entry: Any) -> Entry:
    check_name(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: its header entry is {brief(entry)}, expected a JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{name}: dtype is {brief(dtype)}, expected a name such as BF16")
    for key, numbers, most in (("shape", shape, _MAX_DIMS), ("data_offsets", offsets, 2)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > most
            or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers)
        ):
            raise ValueError(
                f"{name}: {key} is {brief(numbers)}, expected a list of up to {most} sizes"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name}: data_offsets are {brief(offsets)}, expected [begin, end]")
    check_shape(shape, name)
    nbytes = offsets[1] - offsets[0]
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != nbytes:
        raise ValueError(
            f"{name}: data_offsets span {nbytes:,} bytes, which is not what {dtype}{brief(shape)} "
            "needs"
        )
    return Entry(dtype, tuple(shape), *offsets)
