"""Compiles text generation for an H100, without one, and tells what it takes.

    pip install "jax[cuda13]" ".[models]"
    python tests/cuda/compile_models_for_gpu.py

Only shapes go in. Prints one line of JSON for each model, batch and prompt, with compressed and
with plain weights: bytes on the device, and the shapes of all matrix products in the token loop,
which tell whether XLA computes the same from compressed as from plain weights.
"""

import json
import pathlib
import re
import sys

import compile_for_gpu  # first: it sets what XLA reads once
import jax
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "models"))
import shapes

from df11_jax import models
from df11_jax.models import _table

LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
QWEN_3_14B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
GEMMA_3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "sliding_window": 1024,
}
TOKENS = 1000
# Model, batch, and tokens of the prompts. Of Qwen3-14B, five query heads share one for keys: of the
# scores, XLA could not compile a last part that was shorter than the others.
PROGRAMS = [
    ("Llama-3.1-8B", LLAMA_3_1_8B, 1, 1000),
    ("Llama-3.1-8B", LLAMA_3_1_8B, 1, 31_000),
    ("Llama-3.1-8B", LLAMA_3_1_8B, 8, 1000),
    ("Qwen3-14B", QWEN_3_14B, 8, 1000),
    ("Gemma-3-4B", GEMMA_3_4B, 8, 1000),
]


def describe(config: models.Config, params: models.Params, batch: int, prompt: int) -> dict:
    programs = models.compile_programs(params, config, batch=batch, prompt=prompt, tokens=TOKENS)
    text = programs.decode.as_text()
    products = re.findall(r"= (\w+\[[\d,]*\])\S* dot\(", text)
    targets = re.findall(r'custom_call_target="(\w+)"', text)
    return {
        **models.measure_memory(params, programs)._asdict(),
        "estimate": models.estimate_memory(config, batch=batch, context=prompt + TOKENS - 1).peak,
        "block": shapes.block_nbytes(config),
        "piece": 2 * _table.groups_in_piece(params["embed_tokens"]) * _table.ROWS * config.dim,
        "products": sorted(products),
        "calls": sorted(targets),
    }


def main() -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=compile_for_gpu.H100, topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for name, fields, batch, prompt in PROGRAMS:
        config = models.read_config(fields)
        for compress in (True, False):
            params = shapes.param_shapes(config, compress=compress, sharding=sharding)
            program = {"model": name, "batch": batch, "prompt": prompt, "compressed": compress}
            print(json.dumps(program | describe(config, params, batch, prompt)))


if __name__ == "__main__":
    main()
