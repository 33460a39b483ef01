"""Tiny models of every family: their configurations, and Hugging Face directories of them."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from mostly_slow import mostly_slow
from safetensors.numpy import save_file

from df11_jax.models import RandomSource, read_config

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs transformers and torch: pip install 'df11_jax[test-hf]'",
)


def skip_unknown(model_type: str) -> None:
    """Skips a test of what the installed version of transformers does not know."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")


VOCAB = 300
BOS, EOS = 256, 257

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "dtype": "bfloat16",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_QWEN_3_5 = _SIZES | {
    "full_attention_interval": 2,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    },
}

# `config.json` of each; between them they have everything that the transformer can do.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES
    | {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": _LLAMA3_ROPE},
    "llama-biases": _SIZES
    | {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    },
    "mistral": _SIZES | {"model_type": "mistral", "head_dim": 32, "sliding_window": 8},
    "ministral": _SIZES
    | {
        "model_type": "ministral",
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "ministral3": _SIZES
    | {
        "model_type": "ministral3",
        "head_dim": 32,
        "rope_parameters": _YARN
        | {"rope_theta": 1_000_000.0, "mscale": 1.0, "mscale_all_dim": 0.5}
        | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1},
    },
    "mixtral": _SIZES
    | {
        "model_type": "mixtral",
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "sliding_window": 8,
    },
    "qwen2_moe": _SIZES
    | {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "shared_expert_intermediate_size": 192,
    },
    "qwen3_moe": _SIZES
    | {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
    },
    "phi3": _SIZES
    | {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
        "sliding_window": 512,
    },
    "glm": _SIZES | {"model_type": "glm", "head_dim": 32},
    "glm4": _SIZES | {"model_type": "glm4", "head_dim": 32, "attention_bias": False},
    "qwen2": _SIZES
    | {
        "model_type": "qwen2",
        "rope_theta": 1_000_000.0,
        "rope_scaling": _YARN,
        "tie_word_embeddings": True,
    },
    "qwen3": _SIZES
    | {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3_5_text": _QWEN_3_5 | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": _QWEN_3_5
    | {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 96,
    },
    "gemma3_text": _SIZES
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma4_text": _SIZES
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 8,
        "final_logit_softcapping": 3.0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
}

# For parametrize: one for each kind of weights and of caches. qwen2_moe has experts, and one for
# all tokens; gemma4_text has windows, and layers that share caches. What the others have of their
# own (positions, norms, biases) is in the logits and tokens that all are tested for.
_KINDS = ("llama", "qwen2_moe", "qwen3_5_text", "gemma4_text")
KINDS = mostly_slow(_KINDS)
EACH = mostly_slow([*_KINDS, *sorted(CONFIGS.keys() - set(_KINDS))], fast=2)


class NoisySource(RandomSource):
    """Random weights, of which some kernels cannot be compressed."""

    def read(self, name):
        tensor = super().read(name)
        if "up_proj" not in name:
            return tensor
        bits = np.random.default_rng(0).integers(0, 2**16, tensor.shape, np.uint16)
        return bits.view(tensor.dtype)


def source_of(family: str) -> RandomSource:
    """Random weights of the tiny model."""
    return RandomSource(read_config(CONFIGS[family]))


def write_directory(
    path: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    shards: int = 1,
) -> Path:
    """Writes a Hugging Face directory.

    Args:
        path: the path of the directory, which is made.
        fields: the content of `config.json`.
        tensors: the tensors by name.
        shards: the number of files that the tensors are spread over, with an index if several.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(fields))
    make_tokenizer().save(str(path / "tokenizer.json"))
    names = list(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        index = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for i, file in enumerate(files):
        part = [name for j, name in enumerate(names) if j * shards // len(names) == i]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    return path


def write_family(path: Path, family: str, shards: int = 1) -> Path:
    """Writes the directory of a tiny model with random weights."""
    source = source_of(family)
    tensors = {name: source.read(name) for name in source.tensors}
    return write_directory(path, CONFIGS[family], tensors, shards)


def make_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer with a token for each byte, and one before each text."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def prompts(batch: int = 2, length: int = 24) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length))
