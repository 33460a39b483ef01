"""Small model directories, and comparisons, for several tests."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from payloads import random_weights
from safetensors.flax import save_file

from df11_jax.checkpoints import Source

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


def all_bits(size: int) -> np.ndarray:
    """Weights of every bit pattern: NaNs with payloads, infinities, zeros, subnormals."""
    return np.arange(size, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16)


def tensors() -> dict[str, np.ndarray]:
    """Tensors of all kinds: that gain and do not, odd, empty, scalar, not bfloat16."""
    weights = {
        "model.embed_tokens.weight": random_weights((300, 128), 1),
        "model.norm.weight": random_weights((128,), 2),
        "odd": random_weights((129, 127), 3),
        "every_bit_pattern": all_bits(1 << 16).reshape(256, 256),
        "incompressible": np.random.default_rng(0)
        .integers(0, 1 << 16, 16385, np.uint16)
        .view(ml_dtypes.bfloat16),
        "cube": random_weights((3, 80, 96), 4),
        "scalar": random_weights((), 5),
        "empty": random_weights((0, 5), 6),
        "bytes": np.arange(7, dtype=np.uint8),
        "floats": np.linspace(0, 1, 5, dtype=np.float32),
        "integers": np.arange(3, dtype=np.int32),
    }
    for i in range(3):
        weights[f"model.layers.{i}.mlp.up_proj.weight"] = random_weights((192, 128), 10 + i)
        weights[f"model.layers.{i}.input_layernorm.weight"] = random_weights((128,), 20 + i)
    return {name: np.asarray(array) for name, array in weights.items()}


def write_model(path: Path, weights: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """A directory as Hugging Face lays it out, written by the library."""
    path.mkdir(parents=True)
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = names[i::shards]
        save_file(
            {name: jnp.asarray(weights[name]) for name in part},
            path / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    return path


def write_unknown_dtype(path: Path) -> Path:
    """A directory with a file that has 24 bytes of a dtype that numpy lacks, and a matrix."""
    path.mkdir()
    header = {
        "__metadata__": {"format": "pt", "by": "somebody"},
        "a.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]},
        "four bits": {"dtype": "F4", "shape": [3, 16], "data_offsets": [16, 40]},
    }
    text = json.dumps(header).encode()
    data = bytes(16) + bytes(range(24))
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def assert_holds(source: Source, weights: Mapping[str, np.ndarray]) -> None:
    """A checkpoint gives exactly these tensors, bit for bit."""
    assert set(source.tensors) == set(weights)
    for name, expected in weights.items():
        info, actual = source.tensors[name], source.read(name)
        assert info.shape == actual.shape == expected.shape, name
        assert actual.dtype == expected.dtype, name
        assert info.nbytes == expected.nbytes, name
        assert actual.tobytes() == expected.tobytes(), name
