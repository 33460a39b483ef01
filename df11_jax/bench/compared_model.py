"""The model that `df11-jax compare` measures: from a directory, or with random weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from df11_jax._files.directory import read_json
from df11_jax._files.folder import CONFIG
from df11_jax.bench.device import free_host_bytes
from df11_jax.checkpoints import TensorSource, open_checkpoint
from df11_jax.models import Config, RandomSource, read_config
from df11_jax.models.estimate import estimate_weights

LLAMA_3_1_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# The same with all sides divided by 8, and fewer layers.
_SMALL = {
    **LLAMA_3_1_8B,
    "vocab_size": 16_032,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


class ComparedModel(NamedTuple):
    """A model that is open, and not loaded.

    Attributes:
        name: its path, or what its random weights have the shapes of.
        config: its configuration.
        source: its tensors; if they are random, those of one layer, which all layers have.
        distinct: its configuration with no more layers than the source has.
    """

    name: str
    config: Config
    source: TensorSource
    distinct: Config


def open_model(model: str | None) -> ComparedModel:
    """Opens a model.

    Args:
        model: a directory; or a `config.json`, for random weights of its shapes; None for random
            weights of Llama-3.1-8B's shapes on a GPU, of smaller ones on a CPU.

    Raises:
        OSError: it cannot be read.
        ValueError: it cannot be read, its layers differ or have experts, or its weights do not fit
            into the host's memory.
    """
    if model is not None and (path := Path(model)).is_dir():
        source = open_checkpoint(path)
        config = read_config(source.model_config(), str(path / CONFIG))
        _check_is_comparable(config)
        opened = ComparedModel(model, config, source, config)
    else:
        opened = _random_model(model)
    _check_host_memory(opened)
    return opened


def _random_model(file: str | None) -> ComparedModel:
    if file is not None:
        config, shapes = read_config(read_json(Path(file)), file), f"the shapes in {file}"
    elif jax.default_backend() == "cpu":
        config, shapes = read_config(_SMALL), "Llama-3.1-8B's shapes / 8, with 8 layers"
    else:
        config, shapes = read_config(LLAMA_3_1_8B), "Llama-3.1-8B's shapes"
    _check_is_comparable(config)
    # Drawing and compressing all layers of 8 G weights would take longer than all measurements. On
    # the device each layer has memory of its own, so that they take as long as different ones.
    distinct = dataclasses.replace(config, layers=1, sliding=config.sliding[:1])
    name = f"random weights of {shapes}, the same in all layers"
    return ComparedModel(name, config, RandomSource(distinct), distinct)


def _check_is_comparable(config: Config) -> None:
    """Raises ValueError for a model that is not decompressed block by block, all of them alike."""
    what = "is a mixture of experts, of which a step decompresses those that tokens choose"
    if config.experts.count or config.layers_differ:
        what = what if config.experts.count else "has layers of several shapes"
        raise ValueError(
            f"a {config.family} transformer {what}: such cannot be compared. See df11-jax generate "
            "and fit"
        )


def _check_host_memory(opened: ComparedModel) -> None:
    """Raises ValueError if the weights, compressed and plain, do not fit beside what runs here."""
    free = free_host_bytes()
    weights = estimate_weights(opened.distinct)
    needed = weights.plain + weights.least
    if free is not None and needed > free:
        raise ValueError(
            f"{opened.name}: the weights, compressed and plain, take {needed / 1e9:.1f} GB of the "
            f"host's memory, and {free / 1e9:.1f} GB are free"
        )
