"""The demo's weights: one function writes the file, one reads the bundled one."""

import importlib.resources
import pathlib

from df11_jax import checkpoints, compress_params
from df11_jax.demo import model


def save(params: model.Params, path: pathlib.Path) -> None:
    """Compresses bf16 parameters and writes them to a safetensors file."""
    checkpoints.save(compress_params(params, stacked="^layers/"), path)


def load_checkpoint() -> model.Params:
    """The bundled parameters, compressed, on the default device."""
    bundled = importlib.resources.files(__package__) / "checkpoint.safetensors"
    with importlib.resources.as_file(bundled) as path:
        return checkpoints.load(path)
