"""The files of a published checkpoint: which tensors each holds, and how it is written."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from df11_jax._bits import have_same_bits
from df11_jax._files.canonical_safetensors import write_file
from df11_jax._files.safetensors import DTYPE_NAMES, TensorFile
from df11_jax._files.source import TensorInfo
from df11_jax.published._checkpoint import Checkpoint
from df11_jax.published._encode import encode_unit
from df11_jax.published._patterns import PatternDict
from df11_jax.published._unit import ARRAYS

_REST = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to be written.

    Attributes:
        file: the path of the file.
        unit: the name of the module whose unit it holds, or None.
        weights: the tensors of the unit, in their order.
        others: the tensors that are not compressed.
    """

    file: Path
    unit: str | None
    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.weights + self.others


class ShardWriter:
    """Writes the files of one checkpoint.

    Attributes:
        refusals: descriptions of the units that the layout cannot hold.
    """

    def __init__(
        self,
        read: Callable[[str], np.ndarray],
        infos: Mapping[str, TensorInfo],
        patterns: PatternDict,
        threads: int | None,
    ) -> None:
        self.refusals: list[str] = []
        self._read = read
        self._infos = infos
        self._patterns = patterns
        self._threads = threads

    def write(self, shard: Shard) -> None:
        """Writes a file, unless it exists and holds the right bits already."""
        if shard.unit is None:
            if not self._is_written(shard, self._read):
                self._write_file(shard, {}, self._read, {"format": "pt"})
            return
        weights = {name: self._read(name) for name in shard.weights}

        def read(name: str) -> np.ndarray:
            return weights[name] if name in weights else self._read(name)

        if self._is_written(shard, read):
            return
        try:
            unit = encode_unit(weights, threads=self._threads)
        except ValueError as error:
            self.refusals.append(f"{shard.unit}: {error}")
            return
        if self.refusals:
            return
        sizes = [weight.size for weight in weights.values()]
        parts = {part: np.asarray(getattr(unit, part)) for part in ARRAYS}
        parts["output_positions"] = parts["output_positions"].view(np.uint8)
        parts["split_positions"] = np.cumsum(sizes, dtype=np.int64)[:-1]
        self._write_file(
            shard, {f"{shard.unit}.{part}": array for part, array in parts.items()}, read
        )
        if not self._is_written(shard, read):
            raise RuntimeError(
                f"{shard.file}: unit {shard.unit} does not come back as it was; the original is "
                "untouched. Please report this: it is a bug, or broken hardware"
            )

    def _write_file(
        self,
        shard: Shard,
        parts: Mapping[str, np.ndarray],
        read: Callable[[str], np.ndarray],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        tensors = {name: self._infos[name] for name in shard.others}
        for name, part in parts.items():
            dtype = DTYPE_NAMES[part.dtype]
            tensors[name] = TensorInfo(part.shape, dtype, part.nbytes, part.nbytes)
        write_file(
            shard.file,
            tensors,
            lambda name: parts[name] if name in parts else read(name),
            metadata,
        )

    def _is_written(self, shard: Shard, read: Callable[[str], np.ndarray]) -> bool:
        """Whether the file exists, and holds the tensors that `read` returns, bit by bit."""
        if not shard.file.exists():
            return False
        stored: dict[str, Callable[[], np.ndarray]]
        try:
            if shard.unit is None:
                file = TensorFile(shard.file)
                stored = {name: functools.partial(file.array, name) for name in file.entries}
            else:
                shapes = {name: self._infos[name].shape for name in shard.weights}
                checkpoint = Checkpoint(shard.file, shapes, self._patterns)
                stored = {
                    name: functools.partial(checkpoint.read, name, threads=self._threads)
                    for name in checkpoint.tensors
                }
            return set(stored) == set(shard.tensors) and all(
                have_same_bits(stored[name](), read(name)) for name in shard.tensors
            )
        except ValueError:
            return False


def plan_shards(
    path: Path, units: Mapping[str, tuple[str, ...]], infos: Mapping[str, TensorInfo]
) -> list[Shard]:
    """Divides tensors among files: one for each unit and its module, and one for the rest.

    Args:
        path: the path of the directory.
        units: the modules, and the tensors of their units.
        infos: all tensors.

    Raises:
        ValueError: a unit's name cannot be that of a file of its own.
    """
    compressed = {name for names in units.values() for name in names}
    others: dict[str | None, list[str]] = {unit: [] for unit in (*units, None)}
    for name in infos:
        if name not in compressed:
            # The innermost module owns a tensor if one lies within another.
            owners = [unit for unit in units if name.startswith(f"{unit}.")]
            others[max(owners, key=len, default=None)].append(name)
    shards = [
        Shard(path / f"{unit.replace('.', '_')}.safetensors", unit, names, tuple(others[unit]))
        for unit, names in units.items()
    ]
    if others[None]:
        shards.append(Shard(path / _REST, None, (), tuple(others[None])))
    files: dict[Path, str | None] = {}
    for shard in shards:
        if shard.file.parent != path or shard.file in files:
            raise ValueError(
                f"{shard.unit or 'the rest'}: its file would be {shard.file}, which is no name of "
                "a file of its own; rename the module"
            )
        files[shard.file] = shard.unit
    return shards
