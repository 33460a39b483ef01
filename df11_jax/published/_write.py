"""Writes published checkpoints: a file for each unit, and config.json last."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from df11_jax._bits import have_same_bits
from df11_jax._files.atomic import new_file
from df11_jax._files.directory import copy_small_files
from df11_jax._files.folder import CONFIG
from df11_jax._files.folder_source import FolderSource
from df11_jax._files.journal import Job, incomplete
from df11_jax._files.model_config import ModelConfig
from df11_jax._files.source import (
    Source,
    TensorInfo,
    TensorSource,
    unchanged,
)
from df11_jax._host_codec import thread_count
from df11_jax._progress import ProgressBar
from df11_jax.published._checkpoint import GEOMETRY
from df11_jax.published._patterns import PatternDict, check_pattern_dict, match_units
from df11_jax.published._pytree_source import PyTreeSource
from df11_jax.published._unit_files import ShardWriter, plan_shards
from df11_jax.published.detect import CONFIG_KEY

_DFLOAT11_VERSION = "0.5.0"  # which readers ignore


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
    rest, and config.json lists the units. After a unit is written, it is decoded and compared bit
    by bit. Beside `tensors`, the host holds one unit at a time.

    While the directory has a file `df11_jax-incomplete.json`, it is incomplete. If the call is
    interrupted, the same call goes on, and keeps the files that hold the right bits.

    Tensors have PyTorch's names and shapes: `model.layers.0.mlp.up_proj.weight` is a matrix of
    outputs by inputs.

    Args:
        tensors: a pytree of arrays and `DF11Array`s, whose paths, joined by dots, are the names;
            or a checkpoint of any format, which is read tensor by tensor, and whose tokenizer and
            other small files are copied.
        path: the path of the directory, which is new, empty, or left behind by an interruption.
        pattern_dict: regular expressions for module names, and lists of attributes. If an
            expression matches the whole name of a module, its unit consists of the weights of
            these attributes, in this order; or of its own weight if the list is empty. The first
            match counts. See `default_pattern_dict`.
        config: the content of the model's config.json, to which the description of the units is
            added. If it says that the embeddings are tied, `lm_head` is left out.
        progress: whether to show a progress bar, in bytes.
        threads: the number of threads; None for all that this process may run on.

    Raises:
        FileExistsError: something else is at `path`.
        OSError: reading or writing failed.
        TypeError: JSON cannot hold `config`, or `threads` is not an integer.
        ValueError: the layout cannot hold a unit (a weight is not bfloat16 or not a matrix, or has
            an exponent of 240 or more), a unit lacks a tensor, no unit matches, or names do not
            fit; the message names all such units, and no file stays. Or `threads` is below 1, or a
            checkpoint was changed while it was read.
        RuntimeError: a unit does not come back as it was, because of broken hardware or a bug.
    """
    path = Path(path)
    source = tensors if isinstance(tensors, Source) else PyTreeSource(tensors)
    patterns = check_pattern_dict(pattern_dict, "write")
    threads = thread_count(threads)
    config_text = _config_text(config or {}, patterns)  # before hours of work end in an error
    infos = _without_tied(source, ModelConfig(config))
    units = match_units(patterns, infos)
    _check_types(units, infos)
    shards = plan_shards(path, units, infos)
    writer = ShardWriter(source.read, infos, patterns, threads)
    headers = [(name, info.dtype, list(info.shape)) for name, info in infos.items()]
    if isinstance(source, Source):
        source.check_current()
    job: Job = {
        "writes": "published",
        "pattern_dict": json.dumps(patterns),
        "tensors": hashlib.sha256(json.dumps(headers).encode()).hexdigest(),
        "files": source.fingerprint() if isinstance(source, Source) else {},
    }
    total = sum(info.nbytes for info in infos.values())
    with incomplete(path, job), ProgressBar("compress", total, show=progress) as bar:
        for shard in shards:
            with unchanged(source):
                writer.write(shard)
            bar.update(shard.file.name, sum(infos[name].nbytes for name in shard.tensors))
        if writer.refusals:
            for shard in shards:
                shard.file.unlink(missing_ok=True)
            raise _refusal_error(writer.refusals)
        if isinstance(source, FolderSource):
            copy_small_files(source.folder, path, config or {})
        if isinstance(source, Source):
            source.check_current()
        with new_file(path / CONFIG) as file:
            file.write(config_text)


def _config_text(config: Mapping[str, Any], patterns: PatternDict) -> bytes:
    published = {
        "version": _DFLOAT11_VERSION,
        **GEOMETRY,
        "pattern_dict": patterns,
    }
    try:
        return json.dumps({**config, CONFIG_KEY: published}, indent=2).encode() + b"\n"
    except TypeError as error:
        raise TypeError(
            f"config: cannot be a config.json: {error}. Pass the content of one, such as what the "
            "method to_dict of a configuration of transformers returns"
        ) from None


def _without_tied(source: TensorSource, model: ModelConfig) -> dict[str, TensorInfo]:
    infos = dict(source.tensors)
    tied = model.tied_names(infos)
    if tied is not None:
        lm_head, embeddings = tied
        if not have_same_bits(source.read(lm_head), source.read(embeddings)):
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
        "the published layout cannot hold these units; nothing was written. Leave them out of the "
        f"pattern dict (they stay uncompressed): {'; '.join(refusals)}"
    )
