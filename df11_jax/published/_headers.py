"""The tensors and units in the headers of a published checkpoint's files, and checks of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from df11_jax._files.atomic import PARTIAL
from df11_jax._files.directory import check_complete, find_indices, read_index
from df11_jax._files.folder import Folder
from df11_jax._files.other_formats import OtherFormatError
from df11_jax._files.safetensors import TensorFile
from df11_jax.published._unit import ARRAYS, BLOCK_BYTES, BLOCK_GAP_BYTES

PARTS = (*ARRAYS, "split_positions")

_PICKLES = (".pkl", ".pickle", ".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor, as it lies in a file.

    Attributes:
        name: the name of the tensor.
        source: the open file.
    """

    name: str
    source: TensorFile

    @property
    def file(self) -> Path:
        return self.source.path

    @property
    def dtype(self) -> str:
        return self.source.entries[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.entries[self.name].shape

    @property
    def nbytes(self) -> int:
        return self.source.entries[self.name].nbytes

    def read(self) -> np.ndarray:
        """The tensor, as a read-only view of the file; its bytes if numpy has no such type.

        Raises:
            ValueError: the file was changed since it was opened.
        """
        return self.source.array(self.name)


@dataclasses.dataclass(frozen=True)
class StoredUnit:
    """A unit's six tensors, as they lie in files.

    Attributes:
        name: the name of the module that owns them, such as `model.layers.0`.
        parts: the tensors, by the names of `PARTS`.
    """

    name: str
    parts: Mapping[str, StoredTensor]

    def __str__(self) -> str:
        return f"{self.file}: unit {self.name}"

    @property
    def file(self) -> Path:
        """The file that holds the unit, or most of it if it is spread over several."""
        return (self.parts.get("sign_mantissa") or next(iter(self.parts.values()))).file

    @property
    def size(self) -> int:
        """The number of elements of the unit."""
        return self.parts["sign_mantissa"].shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def read_headers(folder: Folder) -> dict[str, StoredTensor]:
    """All tensors in the files of a checkpoint, in the order of the files.

    Args:
        folder: the directory or file.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, a pickle, or not finished; there is no file; two files hold
            the same tensor; or an index names another file for a tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _find_files(folder):
        try:
            source = folder.tensors(file)
        except OtherFormatError:
            raise
        except ValueError as error:
            raise ValueError(f"{error}; download or write it again") from None
        for name in source.entries:
            if name in tensors:
                raise ValueError(
                    f"{source.path}: {name}: is in {tensors[name].file}, too; remove the file that "
                    "does not belong to the checkpoint"
                )
            tensors[name] = StoredTensor(name, source)
    # DFloat11's own index lists only the tensors that no unit owns, so others may be missing.
    for index in find_indices(folder):
        for name, shard in read_index(folder, index).items():
            if name not in tensors or tensors[name].file.name != shard:
                raise ValueError(
                    f"{folder.directory / shard}: {name}: {index} says that it is in this file, "
                    "but it is not; download the file again"
                )
    return tensors


def find_units(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredUnit]:
    """Finds the units among tensors, and checks their headers.

    Raises:
        ValueError: there are no units, a unit lacks a part, or its parts do not fit each other.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            modules.setdefault(module, {})[part] = tensor
    if not modules:
        raise ValueError(
            f"{path}: holds no compressed unit, so it is not a published DFloat11 checkpoint, or "
            f"one of a layout that is not known (a unit is six tensors, {', '.join(PARTS)})"
        )
    nowhere = [part for part in PARTS if not any(part in parts for parts in modules.values())]
    if nowhere and len(modules) > 1:
        raise ValueError(
            f"{path}: no unit has {', '.join(nowhere)}, so it is a checkpoint of another layout of "
            f"DFloat11 than the one that is known, whose units are six tensors, {', '.join(PARTS)}"
        )
    units = {module: StoredUnit(module, parts) for module, parts in modules.items()}
    for unit in units.values():
        missing = [part for part in PARTS if part not in unit.parts]
        if missing:
            raise ValueError(
                f"{unit}: {', '.join(missing)} is missing; download or write the checkpoint again"
            )
        _check_parts(unit)
    return units


def _find_files(folder: Folder) -> list[str]:
    """The names of the safetensors files of a directory, or of the single file.

    Raises:
        ValueError: a file is a pickle, or not finished; or there is none.
    """
    path = folder.path
    if not folder.is_file:
        check_complete(folder)
        if not folder.tensor_files:
            pickles = [name for name in folder.names if name.endswith(_PICKLES)]
            if pickles:
                raise OtherFormatError(
                    f"{folder.directory / pickles[0]}: is a pickle, as DFloat11 wrote them before "
                    "version 0.2. It is not read, since reading one can run any code; get the "
                    "checkpoint as safetensors, or compress the original"
                )
            raise ValueError(f"{path}: there are no *.safetensors files in it")
        return folder.tensor_files
    if path.suffix == PARTIAL:
        raise ValueError(f"{path}: is incomplete: writing it was interrupted")
    return [path.name]


def _check_parts(unit: StoredUnit) -> None:
    """Checks types and shapes of a unit's parts against each other."""
    for part in PARTS:
        dtype, ndim = ("I64" if part == "split_positions" else "U8"), 1 + (part == "luts")
        tensor = unit.parts[part]
        if tensor.dtype != dtype or len(tensor.shape) != ndim:
            raise _part_error(unit, part, f"{dtype} with {ndim} dimension(s)")
    n, n_bytes = unit.size, unit.parts["encoded_exponent"].nbytes
    # Codes have 1 to 32 bits; a last byte is filled up.
    least, most = -(-n // 8), 4 * n + 1
    if not least <= n_bytes <= most:
        raise _part_error(unit, "encoded_exponent", f"{least} to {most} bytes for {n} elements")
    rows, columns = unit.parts["luts"].shape
    if rows < 2 or columns != 256:
        raise _part_error(unit, "luts", "U8[2 or more, 256]")
    blocks = -(-n_bytes // BLOCK_BYTES)
    # If no code starts in the last block, the end takes the place of the block's entry.
    for part, expected in (
        ("output_positions", {4 * (blocks + 1), 4 * max(blocks, 1)}),
        ("gaps", {BLOCK_GAP_BYTES * blocks}),
    ):
        if unit.parts[part].nbytes not in expected:
            numbers = " or ".join(map(str, sorted(expected, reverse=True)))
            raise _part_error(unit, part, f"{numbers} bytes for {n_bytes} of encoded_exponent")


def _part_error(unit: StoredUnit, part: str, expected: str) -> ValueError:
    tensor = unit.parts[part]
    return ValueError(
        f"{unit}: {part} is {tensor.dtype}{list(tensor.shape)}, expected {expected}; download or "
        "write the checkpoint again"
    )
