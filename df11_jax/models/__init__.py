"""Llama, Mistral, Qwen, Phi, GLM and Gemma in Flax, generating text from compressed weights.

`load` reads a Hugging Face directory and returns a `TextModel`: a configuration, a tokenizer, and
parameters, which may be plain or compressed. The other functions work on these parts.
"""

import importlib.util

if importlib.util.find_spec("flax") is None:
    raise ImportError('df11_jax.models needs flax. Install with: pip install "df11_jax[models]"')

from df11_jax.models._cache import Cache, Slots, init_cache
from df11_jax.models._config import Config, Experts, Rope
from df11_jax.models._devices import find_mesh, place_params
from df11_jax.models._generate import generate
from df11_jax.models._hf_config import read_config
from df11_jax.models._hf_fields import UnsupportedModelError
from df11_jax.models._load import load_params
from df11_jax.models._memory import Memory, measure_memory
from df11_jax.models._programs import (
    NO_TOKEN,
    Programs,
    State,
    compile_programs,
    decode,
    prefill,
)
from df11_jax.models._random import RandomSource
from df11_jax.models._sampling import Sampling
from df11_jax.models._text import Completion, TextModel, load, read_directory
from df11_jax.models._transformer import Params, forward, project
from df11_jax.models.estimate import estimate_memory

__all__ = [
    "NO_TOKEN",
    "Cache",
    "Completion",
    "Config",
    "Experts",
    "Memory",
    "Params",
    "Programs",
    "RandomSource",
    "Rope",
    "Sampling",
    "Slots",
    "State",
    "TextModel",
    "UnsupportedModelError",
    "compile_programs",
    "decode",
    "estimate_memory",
    "find_mesh",
    "forward",
    "generate",
    "init_cache",
    "load",
    "load_params",
    "measure_memory",
    "place_params",
    "prefill",
    "project",
    "read_config",
    "read_directory",
]
