"""What does XLA make of Flax models with compressed parameters on an H100, without one?

    pip install "jax[cuda13]" flax optax
    python benchmarks/compile_flax_for_gpu.py

Prints one line of JSON a program: temporary memory in dense blocks, calls of the decoder, fused
products, and how many compressed words are copied or sliced; for steps of LoRA, all memory that
they need.
"""

import importlib.util
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from h100 import placed

import df11_jax.linen
import df11_jax.nnx

LAYERS, WIDTH, BATCH, TOKENS = 8, 1024, 4, 5
BLOCK_BYTES = 2 * 2 * 4 * WIDTH * WIDTH

bf16 = {"use_bias": False, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        hidden = nn.gelu(nn.Dense(4 * WIDTH, name="up", **bf16)(x))
        return x + nn.Dense(WIDTH, name="down", **bf16)(hidden), None


SCAN = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}


class Unrolled(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        for i in range(LAYERS):
            x, _ = self.block(name=f"layers_{i}")(x)
        return x, None


LINEN = {
    "scan": df11_jax.linen.scan(Block, **SCAN)(),
    "scan, fused": df11_jax.linen.scan(Block, fused=True, **SCAN)(),
    "nn.scan of compressed": nn.scan(df11_jax.linen.compressed(Block), **SCAN)(),
    "nn.scan": nn.scan(Block, **SCAN)(),
    "unrolled compressed": Unrolled(df11_jax.linen.compressed(Block)),
    "unrolled compressed, fused": Unrolled(df11_jax.linen.compressed(Block, fused=True)),
    "unrolled": Unrolled(Block),
}


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs, **bf16)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs, **bf16)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class NnxUnrolled(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return x


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: NnxBlock(rngs))
        self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)

    def __call__(self, x):
        run = nnx.scan(
            nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return run(x, self.layers)


class NnxScanBlocks(NnxScanned):
    lazy = False

    def __call__(self, x):
        graphdef, stacked = nnx.split(self.layers)

        def run(x, layer, _):
            return nnx.merge(graphdef, layer, copy=True)(x), None

        return df11_jax.scan_blocks(run, x, stacked, lazy=self.lazy)[0]


class NnxLazyBlocks(NnxScanBlocks):
    lazy = True


def models() -> Iterator[tuple[str, Any, Any]]:
    """Name, a function of weights and activations, and compressed weights."""
    x = jnp.zeros((BATCH, WIDTH), jnp.bfloat16)
    for name, model in LINEN.items():
        plain = jax.jit(model.init)(jax.random.key(0), x, None)
        stacked = "." if "scan" in name else None
        weights = df11_jax.compress_params(plain, stacked=stacked)
        yield f"linen {name}", lambda w, x, model=model: model.apply(w, x, None)[0], weights
    for name, model_type in (
        ("remat", NnxUnrolled),
        ("remat, fused", NnxUnrolled),
        ("nnx.scan of remat", NnxScanned),
        ("scan_blocks", NnxScanBlocks),
        ("scan_blocks, fused", NnxLazyBlocks),
    ):
        model = model_type(nnx.Rngs(0))
        stacked = None if model_type is NnxUnrolled else "."
        df11_jax.nnx.compress(model, stacked=stacked, fused="fused" in name)
        graphdef, state = nnx.split(model)
        yield f"nnx {name}", lambda w, x, g=graphdef: nnx.merge(g, w, copy=True)(x), state


def main() -> None:
    x = jnp.zeros((BATCH, WIDTH), jnp.bfloat16)
    for name, forward, weights in models():

        def token_loop(weights, x, forward=forward):
            return jax.lax.fori_loop(0, TOKENS, lambda _, x: forward(weights, x), x)

        def gradient(weights, x, forward=forward):
            return jax.grad(lambda x: jnp.sum(forward(weights, x).astype(jnp.float32)))(x)

        for program in (token_loop, gradient):
            compiled = jax.jit(program).lower(*placed((weights, x))).compile()
            text = compiled.as_text()
            moved = re.findall(r"= u32\[([\d,]+)\]\S* (?:copy|dynamic-slice)\(", text)
            print(
                json.dumps(
                    {
                        "model": name,
                        "program": program.__name__,
                        "temporary_blocks": round(
                            compiled.memory_analysis().temp_size_in_bytes / BLOCK_BYTES, 3
                        ),
                        "decode_calls": text.count('custom_call_target="df11_decode"'),
                        "products": text.count('custom_call_target="df11_product"'),
                        "words_moved": sum(math.prod(map(int, m.split(","))) for m in moved),
                    }
                ),
                flush=True,
            )

    path = pathlib.Path(__file__).resolve().parents[1] / "examples" / "lora.py"
    spec = importlib.util.spec_from_file_location("lora", path)
    lora = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lora)
    lora.WIDTH = WIDTH
    plain, small, adapters = lora.initialise()
    state = lora.OPTIMIZER.init(adapters)
    tokens = jax.ShapeDtypeStruct((lora.BATCH, lora.LENGTH), jnp.int32)
    for name, model, params in (
        ("lora plain", lora.PLAIN, plain),
        ("lora compressed", lora.COMPRESSED, small),
    ):
        arguments = placed((adapters, state, params, tokens))
        step = lora.train_step.lower(*arguments[:2], model, *arguments[2:])
        memory = step.compile().memory_analysis()
        print(
            json.dumps(
                {
                    "model": name,
                    "program": "train_step",
                    "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
                    "arguments": memory.argument_size_in_bytes,
                    "temporary": memory.temp_size_in_bytes,
                }
            )
        )


if __name__ == "__main__":
    main()
