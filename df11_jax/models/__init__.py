"""Llama 3, Qwen 2.5, Qwen 3 and Gemma 3 in Flax, generating text from compressed weights.

`load` takes a Hugging Face directory. What it returns is made of the rest: a configuration,
parameters (plain or compressed: the same functions take both), and a tokenizer.
"""

import importlib.util

if importlib.util.find_spec("flax") is None:
    raise ImportError('df11_jax.models needs flax. Install with: pip install "df11_jax[models]"')

from df11_jax.models._cache import Cache, Slots, init_cache
from df11_jax.models._config import Config, Rope
from df11_jax.models._estimate import estimate_memory
from df11_jax.models._generate import NO_TOKEN, State, decode, generate, prefill
from df11_jax.models._hf_config import UnsupportedModelError, read_config
from df11_jax.models._load import load_params
from df11_jax.models._memory import Memory, Programs, compile_programs, measure_memory
from df11_jax.models._parallel import find_mesh
from df11_jax.models._placement import place_params
from df11_jax.models._random import RandomSource
from df11_jax.models._sampling import Sampling
from df11_jax.models._text import Completion, TextModel, load, read_directory
from df11_jax.models._transformer import Params, forward, project

__all__ = [
    "NO_TOKEN",
    "Cache",
    "Completion",
    "Config",
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
