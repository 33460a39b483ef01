"""What does text generation take on H100s? Compiles it for them, without one.

    pip install "jax[cuda13]" ".[models]"
    python benchmarks/compile_models_for_gpu.py

Only shapes go in. Prints one line of JSON for each model, batch and prompt, with compressed weights
whose products are exact, with plain ones, and with compressed ones whose products are fused: bytes
on the device, and the shapes of all matrix products in the token loop, which tell whether XLA
computes the same from compressed as from plain weights; and the bytes that each of two hosts would
send to the other for a token.
"""

import dataclasses
import json
import re

import h100  # first: it sets what XLA reads once
import jax
import network
import shapes
from known_configs import KNOWN

from df11_jax import models
from df11_jax.models._leaf_builders import is_candidate_leaf
from df11_jax.models._transformer import block_shapes

TOKENS = 1000
# Model, batch, tokens of the prompts, devices, and stages. Of Qwen3-14B, five query heads share one
# for keys: of the scores, XLA could not compile a last part that was shorter than the others.
PROGRAMS = [
    ("Llama-3.1-8B", 1, 1000, 1, 1),
    ("Llama-3.1-8B", 1, 31_000, 1, 1),
    ("Llama-3.1-8B", 8, 1000, 1, 1),
    ("Qwen3-14B", 8, 1000, 1, 1),
    ("gemma-3-4b", 8, 1000, 1, 1),
    ("gemma-3-27b", 1, 31_000, 1, 1),
    ("Qwen3-30B-A3B", 1, 1000, 1, 1),
    ("Qwen3-30B-A3B", 8, 1000, 1, 1),
    ("Qwen3.5-27B", 1, 1000, 1, 1),
    ("gemma-4-31B", 1, 1000, 1, 1),
    ("Llama-3.1-8B", 8, 1000, 2, 1),
    ("Llama-3.1-70B", 1, 1000, 2, 1),
    ("Llama-3.1-70B", 1, 1000, 4, 1),
    ("Llama-3.1-405B", 1, 1000, 8, 1),
    ("Llama-3.1-405B", 1, 1000, 8, 2),
]


def describe(
    config: models.Config, params: models.Params, batch: int, prompt: int, devices: int, stages: int
) -> dict:
    programs = models.compile_programs(params, config, batch=batch, prompt=prompt, tokens=TOKENS)
    text = programs.decode.as_text()
    products = re.findall(r"= (\w+\[[\d,]*\])\S* dot\(", text)
    targets = re.findall(r'custom_call_target="(\w+)"', text)
    # Large arrays in the text of asynchronous operations are those that arrive.
    exchange = r"(?:(?:all|collective)-[a-z-]+|reduce-scatter)"
    moved = re.findall(rf"= .*?(\w+\[[\d,]*\])\S*\)? {exchange}\(", text)
    # Kernels of a block, which are not compressed in the token loop; those of experts together.
    dense = set()
    for keys, leaf in jax.tree.leaves_with_path(block_shapes(config)):
        path = ("layers", *(key.key for key in keys))
        if is_candidate_leaf(path, (config.layers, *leaf.shape)):
            chosen = [batch * config.experts.per_token] if len(leaf.shape) > 2 else []
            dense.add(f"bf16[{','.join(map(str, (*chosen, *leaf.shape[-2:])))}]")
    return {
        **models.measure_memory(params, programs)._asdict(),
        "estimate": models.estimate_memory(
            config, batch=batch, context=prompt + TOKENS - 1, devices=devices, stages=stages
        ).peak,
        "block": shapes.block_nbytes(config, devices // stages),
        "piece": shapes.piece_nbytes(params),
        "moved": sorted(set(moved)),
        "sent": network.bytes_sent(text, 2) if devices > 1 else 0,
        "cache_copies": [shapes.cache_copies(program) for program in programs[:2]],
        "products": sorted(products),
        "dense": sorted(name for name in dense if name in text),
        "fused": programs.fused,
        "calls": sorted(targets),
    }


def main() -> None:
    for name, batch, prompt, devices, stages in PROGRAMS:
        gpus = h100.devices(devices)
        sharding = jax.sharding.SingleDeviceSharding(gpus[0])
        config = models.read_config(KNOWN[name])
        for way in ("exact", "plain", "fused"):
            compress = way != "plain"
            config = dataclasses.replace(config, exact=way == "exact")
            params = shapes.param_shapes(
                config, compress=compress, sharding=sharding, devices=gpus, stages=stages
            )
            program = {
                "model": name,
                "batch": batch,
                "prompt": prompt,
                "devices": devices,
                "stages": stages,
                "way": way,
            }
            print(json.dumps(program | describe(config, params, batch, prompt, devices, stages)))


if __name__ == "__main__":
    main()
