"""The fixture: a model, and what DFloat11's own library made of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.flax import load_file

from df11_jax._files.canonical_safetensors import write_file
from df11_jax._files.safetensors import DTYPE_NAMES, TensorFile
from df11_jax._files.source import TensorInfo

FIXTURE = Path(__file__).parent / "fixtures" / "tiny_llama"
ORIGINAL = FIXTURE / "original"
SHARDED = FIXTURE / "sharded"
SINGLE = FIXTURE / "single"

LAYER = "model.layers.0"

Tensors = dict[str, np.ndarray]


def original() -> Tensors:
    """The uncompressed model, as the safetensors library reads it."""
    return {k: np.asarray(v) for k, v in load_file(ORIGINAL / "model.safetensors").items()}


def copy_sharded(path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(SHARDED, path / "model"))


def load(file: Path) -> Tensors:
    source = TensorFile(file)
    return {name: source.array(name).copy() for name in source.entries}


def save(file: Path, tensors: Tensors) -> None:
    infos = {
        name: TensorInfo(array.shape, DTYPE_NAMES[array.dtype], array.nbytes, array.nbytes)
        for name, array in tensors.items()
    }
    write_file(file, infos, tensors.__getitem__)


def edit(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load(file)
    change(tensors)
    save(file, tensors)
