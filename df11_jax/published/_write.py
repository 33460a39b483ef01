"""Published checkpoints, written: units by a pattern dict, a file for each, the config last."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import decompress
from df11_jax._files.atomic import new_file
from df11_jax._files.directory import CONFIG, PUBLISHED_CONFIG, copy_small_files
from df11_jax._files.journal import incomplete
from df11_jax._files.safetensors import DTYPE_NAMES, DTYPES, TensorFile
from df11_jax._files.source import Source, TensorInfo
from df11_jax._host_arrays import as_bytes, to_host
from df11_jax._progress import ProgressBar
from df11_jax.published._checkpoint import GEOMETRY, Checkpoint
from df11_jax.published._patterns import PatternDict, check_pattern_dict, match_units
from df11_jax.published._serialize import write_file
from df11_jax.published._shapes import ModelConfig
from df11_jax.published._unit import ARRAYS, encode_unit

_LAYOUT_VERSION = "0.5.0"  # of DFloat11; readers do not look at it
_REST = "model.safetensors"


def write(
    tensors: PyTree | Source,
    path: str | os.PathLike[str],
    pattern_dict: PatternDict,
    *,
    config: Mapping[str, Any] | None = None,
    progress: bool = False,
    threads: int | None = None,
) -> None:
    """Writes a DFloat11 checkpoint, which its own library can use.

    Each unit gets a file, which holds all tensors of its module; `model.safetensors` holds the
    rest, and config.json says which units there are. A unit is decoded again and compared bit by
    bit once it is written. Beside `tensors`, the host holds one unit at a time.

    A file `df11_jax-incomplete.json` says that the directory is incomplete until everything is
    written. If the call is interrupted, the same call goes on: files that hold the same bits are
    kept.

    Tensors are named and shaped as PyTorch has them: `model.layers.0.mlp.up_proj.weight` is a
    matrix of outputs by inputs.

    Args:
        tensors: a pytree of arrays and `DF11Array`s, whose paths, joined by dots, are the names;
            or a checkpoint of any format, which is read tensor by tensor, and whose tokenizer and
            other small files are copied.
        path: of the directory: new, empty, or left behind by an interruption.
        pattern_dict: regular expressions of module names, and lists of attributes. The unit of a
            module that an expression matches wholly consists of the weights of these attributes,
            in this order; or, if the list is empty, of its own weight. The first match counts. See
            `default_pattern_dict`.
        config: the content of the model's config.json, to which that of the units is added. If it
            says that the embeddings are tied, `lm_head` is left out.
        progress: show a progress bar, in bytes.
        threads: how many threads to use; None for all that this process may run on.

    Raises:
        FileExistsError: something else is at `path`.
        OSError: reading or writing failed.
        ValueError: the layout cannot hold a unit (a weight is not bfloat16 or not a matrix, or has
            an exponent of 240 or more), a unit lacks a tensor, no unit matches, or names do not
            fit; the message names all such units. Nothing is left of what was written.
        RuntimeError: a unit does not come back as it was: broken hardware, or a bug.
    """
    path = Path(path)
    source = tensors if hasattr(tensors, "tensors") else _Tree(tensors)
    patterns = check_pattern_dict(pattern_dict, "write")
    infos = _without_tied(source, ModelConfig(config))
    units = match_units(patterns, infos)
    _check_types(units, infos)
    shards = _plan(path, units, infos)
    writer = _ShardWriter(source.read, infos, patterns, threads)
    headers = [(name, info.dtype, list(info.shape)) for name, info in infos.items()]
    job = {
        "writes": "published",
        "pattern_dict": json.dumps(patterns),
        "tensors": hashlib.sha256(json.dumps(headers).encode()).hexdigest(),
    }
    total = sum(info.nbytes for info in infos.values())
    with incomplete(path, job), ProgressBar("compress", total, show=progress) as bar:
        for shard in shards:
            writer.write(shard)
            bar.update(shard.file.name, sum(infos[name].nbytes for name in shard.tensors))
        if writer.refusals:
            for shard in shards:
                shard.file.unlink(missing_ok=True)
            raise _refusal_error(writer.refusals)
        published = {
            "version": _LAYOUT_VERSION,
            **GEOMETRY,
            "pattern_dict": patterns,
        }
        with new_file(path / CONFIG) as file:
            text = json.dumps({**(config or {}), PUBLISHED_CONFIG: published}, indent=2)
            file.write(text.encode() + b"\n")
        if not isinstance(source, _Tree):
            copy_small_files(source.path, path)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file to be written.

    Attributes:
        file: its path.
        unit: the module whose unit it holds, or None.
        weights: the tensors of the unit, in their order.
        others: tensors that are not compressed.
    """

    file: Path
    unit: str | None
    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.weights + self.others


class _ShardWriter:
    """Writes files of one checkpoint; collects what the layout cannot hold in `refusals`."""

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

    def write(self, shard: _Shard) -> None:
        """Writes a file, unless it is there already."""
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
        shard: _Shard,
        parts: Mapping[str, np.ndarray],
        read: Callable[[str], np.ndarray],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        infos = {name: self._infos[name] for name in shard.others}
        tensors = {name: (info.dtype, tuple(info.shape)) for name, info in infos.items()}
        tensors |= {name: (DTYPE_NAMES[part.dtype], part.shape) for name, part in parts.items()}
        write_file(
            shard.file,
            tensors,
            lambda name: parts[name] if name in parts else read(name),
            metadata,
        )

    def _is_written(self, shard: _Shard, read: Callable[[str], np.ndarray]) -> bool:
        """Whether the file is there, and holds what `read` gives, bit by bit."""
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
                _have_same_bits(stored[name](), read(name)) for name in shard.tensors
            )
        except ValueError:
            return False


class _Tree:
    """A pytree, read like a checkpoint."""

    def __init__(self, params: PyTree) -> None:
        self._leaves: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=is_df11):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            if name in self._leaves:
                raise ValueError(f"{name}: two leaves have this name")
            if not isinstance(leaf, (DF11Array, jax.Array, np.ndarray, np.generic)):
                raise ValueError(f"{name}: is a {type(leaf).__name__}, expected an array")
            dtype = DTYPE_NAMES.get(leaf.dtype)
            if dtype is None:
                raise ValueError(f"{name}: safetensors files cannot hold {leaf.dtype}")
            self._leaves[name] = leaf
            self.tensors[name] = TensorInfo(leaf.shape, dtype, leaf.nbytes, leaf.nbytes)

    def read(self, name: str) -> np.ndarray:
        leaf = self._leaves[name]
        if isinstance(leaf, DF11Array):
            leaf = decompress(leaf)
        return to_host(leaf)


def _without_tied(source: Source | _Tree, model: ModelConfig) -> dict[str, TensorInfo]:
    infos = dict(source.tensors)
    tied = model.tied_names(infos)
    if tied is not None:
        lm_head, embeddings = tied
        if not _have_same_bits(source.read(lm_head), source.read(embeddings)):
            raise ValueError(
                f"{lm_head}: is not {embeddings}, but the config says that they are tied; set "
                "tie_word_embeddings to false in it, or leave one of them out"
            )
        del infos[lm_head]
    return infos


def _check_types(units: Mapping[str, tuple[str, ...]], infos: Mapping[str, TensorInfo]) -> None:
    if not units:
        raise ValueError(
            "no module matches the pattern dict, so there is nothing to compress; names of tensors "
            f"are like {next(iter(infos), 'none')!r}"
        )
    for name, info in infos.items():
        if info.dtype not in DTYPES:
            raise ValueError(f"{name}: is of type {info.dtype}, which cannot be read or written")
    refusals = [
        f"{unit}: {name} is {infos[name].dtype}{list(infos[name].shape)}, expected a matrix of BF16"
        for unit, names in units.items()
        for name in names
        if infos[name].dtype != "BF16" or len(infos[name].shape) != 2
    ]
    if refusals:
        raise _refusal_error(refusals)


def _refusal_error(refusals: list[str]) -> ValueError:
    return ValueError(
        "\n".join(
            (
                "the published layout cannot hold these units; nothing was written. Leave them out "
                "of the pattern dict (they stay uncompressed):",
                *refusals,
            )
        )
    )


def _plan(
    path: Path, units: Mapping[str, tuple[str, ...]], infos: Mapping[str, TensorInfo]
) -> list[_Shard]:
    compressed = {name for names in units.values() for name in names}
    others: dict[str | None, list[str]] = {unit: [] for unit in (*units, None)}
    for name in infos:
        if name not in compressed:
            # The innermost unit, should one lie within another.
            owners = [unit for unit in units if name.startswith(f"{unit}.")]
            others[max(owners, key=len, default=None)].append(name)
    shards = [
        _Shard(path / f"{unit.replace('.', '_')}.safetensors", unit, names, tuple(others[unit]))
        for unit, names in units.items()
    ]
    if others[None]:
        shards.append(_Shard(path / _REST, None, (), tuple(others[None])))
    files: dict[Path, str | None] = {}
    for shard in shards:
        if shard.file.parent != path or shard.file in files:
            raise ValueError(
                f"{shard.unit or 'the rest'}: its file would be {shard.file}, which is no name of "
                "a file of its own; rename the module"
            )
        files[shard.file] = shard.unit
    return shards


def _have_same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(as_bytes(a), as_bytes(b))
