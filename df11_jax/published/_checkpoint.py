"""Opens, checks and reads published checkpoints, tensor by tensor."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from df11_jax._brief import brief
from df11_jax._files.folder import CONFIG, Folder
from df11_jax._files.folder_source import FolderSource
from df11_jax._files.model_config import ModelConfig
from df11_jax._files.source import Arrangement, TensorInfo
from df11_jax._host_codec import cpu_library
from df11_jax.published._headers import PARTS, StoredUnit, find_units, read_headers
from df11_jax.published._patterns import PatternDict, check_pattern_dict, match_module
from df11_jax.published._shapes import Shapes, check_shape, read_shapes
from df11_jax.published._unit import ARRAYS, PublishedUnit, decode_host
from df11_jax.published.detect import CONFIG_KEY

# These fields are the same in all published checkpoints; the layout cannot hold others.
GEOMETRY = {"threads_per_block": [512], "bytes_per_thread": 8}


@dataclasses.dataclass(frozen=True)
class UnitInfo:
    """Tensors that are compressed together.

    Attributes:
        name: the name of the module that owns them, such as `model.layers.0`.
        tensors: their names, in the order in which they are joined.
        shapes: their shapes in the model.
        sizes: the number of elements of each.
        file: the file that holds the unit.
        compressed_nbytes: the bytes of the unit's six tensors.
    """

    name: str
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    file: Path
    compressed_nbytes: int


class Checkpoint(FolderSource):
    """A DFloat11 checkpoint, as DFloat11's own library and `df11_jax.published.write` make them.

    Opening it opens the files, and reads and checks headers; the contents of a unit are checked
    when it is first read. What is read are the files that were opened, whatever takes their places.

    Attributes:
        path: the path of the directory or file.
        format: `"published"`.
        config: the content of config.json; empty if there is none.
        units: the units by the names of their modules.
        tensors: all tensors of the model, compressed or not, in the order of the files. The
            `stored_nbytes` of a compressed one are the bytes of the unit, divided among its tensors
            in proportion to their elements.
    """

    format = "published"

    def __init__(
        self,
        path: str | os.PathLike[str] | Folder,
        shapes: Shapes | None = None,
        pattern_dict: PatternDict | None = None,
    ) -> None:
        """Opens a checkpoint.

        Args:
            path: a directory with *.safetensors files, or one such file. If there is a config.json
                in the directory, it is used.
            shapes: the shapes of the compressed tensors, by name, or the original model (its
                safetensors file, index, or directory), whose headers have them. Needed unless
                config.json is that of a model type that this library knows: llama, mistral,
                ministral, ministral3, phi3, qwen2, qwen3, glm, glm4, gemma2, gemma3.
            pattern_dict: the tensors that each unit consists of; see `df11_jax.published.write`.
                Needed if config.json does not have it, and a unit has several tensors.

        Raises:
            OSError: there is nothing at `path`, or it cannot be read.
            ValueError: something is damaged, missing, or does not fit; the message names the file,
                the unit and the field, and says what to do.
        """
        super().__init__(path if isinstance(path, Folder) else Folder(Path(path)))
        self.config = self.folder.config
        config = self.folder.directory / CONFIG
        self._patterns = check_pattern_dict(pattern_dict, "Checkpoint") if pattern_dict else None
        if pattern_dict is None and CONFIG_KEY in self.config:
            self._patterns = _published_patterns(self.config[CONFIG_KEY], str(config))
        # Of another layout, which the configuration tells, all else would seem to be damaged.
        self._stored = read_headers(self.folder)
        self._stored_units = find_units(self.path, self._stored)
        self._model = ModelConfig(self.config, str(config))
        self._shapes = read_shapes(shapes)
        self.units = {name: self._unit_info(unit) for name, unit in self._stored_units.items()}
        self.tensors: dict[str, TensorInfo] = {}
        # The unit, the first element and the end of each compressed tensor.
        self._places: dict[str, tuple[StoredUnit, int, int]] = {}
        self._checked: set[str] = set()
        for name, tensor in self._stored.items():
            module, _, part = name.rpartition(".")
            if part not in PARTS:
                info = TensorInfo(tensor.shape, tensor.dtype, tensor.nbytes, tensor.nbytes)
                self._add(name, info, tensor.file)
            elif part == "sign_mantissa":
                self._add_unit(self.units[module])
        if not self.folder.is_file:
            missing = self._model.missing_part(self.tensors)
            if missing is not None:
                raise ValueError(
                    f"{self.path}: there is no tensor of {missing}, which the model has by its "
                    "config.json; download or write the missing files"
                )
        self.folder.check_together()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.units)} units)"

    def read(self, name: str, *, threads: int | None = None) -> Shaped[np.ndarray, "..."]:
        """One tensor of the model, on the host.

        Args:
            name: the name of the tensor. If it is compressed, only its part of the unit is
                decoded.
            threads: the number of threads; None for all that this process may run on.

        Returns:
            The tensor, in the model's shape. If it is not compressed, it is a read-only view of
            the file.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the unit is corrupt, or its file was changed since it was opened.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path}: there is no tensor {name!r}")
        if name not in self._places:
            return self._stored[name].read()
        stored, start, stop = self._places[name]
        unit = self.read_unit(stored.name)
        try:
            weights = decode_host(unit, start, stop, threads=threads)
        except ValueError as error:
            raise _corrupt(stored, str(error)) from None
        return weights.reshape(self.tensors[name].shape)

    def read_unit(self, unit: str) -> PublishedUnit:
        """A unit, still compressed, for `df11_jax.published.decompress`.

        Args:
            unit: the name of the unit's module.

        Returns:
            The unit, with arrays on the host that are read-only views of the file.

        Raises:
            KeyError: there is no such unit.
            ValueError: the unit is corrupt, or its file was changed since it was opened.
        """
        if unit not in self.units:
            raise KeyError(f"{self.path}: there is no unit {unit!r}")
        info, stored = self.units[unit], self._stored_units[unit]
        arrays: dict[str, Any] = {part: stored.parts[part].read() for part in ARRAYS}
        arrays["output_positions"] = np.require(
            arrays["output_positions"].view(np.uint32), requirements="A"
        )
        if unit not in self._checked:
            problem = cpu_library().published_check(**arrays)
            if problem:
                raise _corrupt(stored, problem)
            self._checked.add(unit)
        return PublishedUnit(**arrays, names=info.tensors, shapes=info.shapes)

    def arrangement(self) -> Arrangement:
        """The files of the tensors. Of those before compression, no strings are known."""
        files = {
            name: self._places[name][0].parts["sign_mantissa"].source
            if name in self._places
            else self._stored[name].source
            for name in self.tensors
        }
        return self._arrange(files, lambda file: {})

    def _unit_info(self, unit: StoredUnit) -> UnitInfo:
        positions = unit.parts["split_positions"].read().tolist()
        ends = [0, *positions, unit.size]
        sizes = tuple(stop - start for start, stop in itertools.pairwise(ends))
        if min(sizes) < 0:
            raise ValueError(
                f"{unit}: split_positions is {brief(positions)}, expected ascending positions up "
                f"to {unit.size}; download or write the checkpoint again"
            )
        names = self._tensor_names(unit, len(sizes))
        shapes = tuple(
            self._find_shape(f"{unit}: {name}", name, size)
            for name, size in zip(names, sizes, strict=True)
        )
        return UnitInfo(unit.name, names, shapes, sizes, unit.file, unit.nbytes)

    def _tensor_names(self, unit: StoredUnit, count: int) -> tuple[str, ...]:
        names = match_module(self._patterns, unit.name) if self._patterns else None
        if names is None and count == 1:
            names = match_module({".*": []}, unit.name)
        if names is None:
            raise ValueError(
                f"{unit}: which {count} tensors it consists of is not known: no pattern of "
                f"{CONFIG_KEY} in config.json matches it. Put the checkpoint's "
                "config.json beside the file, or pass pattern_dict=... (--pattern-dict), such as "
                "df11_jax.published.default_pattern_dict(config)"
            )
        if len(names) != count:
            raise ValueError(
                f"{unit}: split_positions makes it {count} tensors, but by the pattern dict it is "
                f"{len(names)}: {', '.join(names)}"
            )
        return names

    def _find_shape(self, where: str, name: str, size: int) -> tuple[int, ...]:
        shape = self._shapes[name] if name in self._shapes else self._model.shape(name)
        if shape is None:
            reason = "there is no config.json of the model"
            if self._model.family is not None:
                reason = f"config.json is of the model type {brief(self._model.family)}"
            raise ValueError(
                f"{where}: its shape in the model is not known ({reason}). Pass shapes=..., the "
                "original model's safetensors file, index or directory, or shapes by name; "
                "`df11-jax compress --shapes` makes a native checkpoint with them, which needs none"
            )
        check_shape(shape, size, where)
        return shape

    def _add_unit(self, unit: UnitInfo) -> None:
        n, start = max(1, sum(unit.sizes)), 0
        for name, shape, size in zip(unit.tensors, unit.shapes, unit.sizes, strict=True):
            stop = start + size
            # Rounded so that the sum is that of the unit.
            stored = unit.compressed_nbytes * stop // n - unit.compressed_nbytes * start // n
            self._add(name, TensorInfo(shape, "BF16", 2 * size, stored), unit.file)
            self._places[name] = (self._stored_units[unit.name], start, stop)
            start = stop

    def _add(self, name: str, info: TensorInfo, file: Path) -> None:
        if name in self.tensors:
            raise ValueError(
                f"{file}: {name}: is there twice, in a unit and uncompressed or in two units"
            )
        self.tensors[name] = info


def _published_patterns(config: Any, path: str) -> dict[str, list[str]]:
    where = f"{path}: {CONFIG_KEY}"
    if not isinstance(config, dict):
        raise ValueError(f"{where}: is {brief(config)}, expected an object")
    for field, expected in GEOMETRY.items():
        if config.get(field, expected) != expected:
            raise ValueError(
                f"{where}: {field} is {brief(config[field])}; only {expected} is known. This is a "
                f"checkpoint of another layout (DFloat11 {brief(config.get('version'))})"
            )
    return check_pattern_dict(config.get("pattern_dict"), where)


def _corrupt(unit: StoredUnit, problem: str) -> ValueError:
    return ValueError(f"{unit}: {problem}; it is damaged: download or write the checkpoint again")
