"""What does XLA make of programs with compressed blocks on an H100? Compiles them, without one.

    pip install "jax[cuda13]"
    python benchmarks/compile_for_gpu.py

Only shapes go in, so that models of any size can be compiled. Prints one line of JSON a program:
temporary memory in dense blocks, calls of the decoder, the shapes of all that is copied or sliced,
what runs in a step of the scan, whether the decoder's call is in a CUDA graph, and calls of the
fused product and of cuBLAS in what `df11-jax bench --product` times.
"""

import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
from h100 import placed
from stack_shapes import compressed_stack
from thunks import decoder_in_graph, dump_options, loop_body, read_thunks

import df11_jax
from df11_jax._layout import make_layout
from df11_jax._product import is_fused_in
from df11_jax.bench.blocks import BLOCKS
from df11_jax.bench.product_programs import ProductWeights, compiler_options, product_calls
from df11_jax.bench.workload import Workload

BATCH, TOKENS = 4, 5


def compressed(layers: int, shape: tuple[int, int]) -> df11_jax.DF11Array:
    return compressed_stack((layers,), make_layout(shape), jax.ShapeDtypeStruct)


def plain(layers: int, shape: tuple[int, int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)


def two_matrices(x, p, _):
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None


def transformer_block(x, p, _):
    """All seven matrices of a block, and in place of attention something much cheaper."""
    query, key, value = (x @ p[name] for name in ("query", "key", "value"))
    groups = query.shape[1] // key.shape[1]
    x = x + (query * jnp.tile(key + value, (1, groups))) @ p["out"]
    return x + (jax.nn.gelu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None


def trivial_block(x, p, _):
    """What `df11-jax bench` scans over."""
    return x + p["query"][0, 0], None


def products(name: str, rows: int, calls: int = 4):
    """The programs that `df11-jax bench --product` compiles for one of Llama-3.1-8B's products."""
    matrices = BLOCKS["Llama-3.1-8B"].products[name]
    slices = 2
    workload = Workload(name, tuple(compressed(slices, shape) for shape in matrices.values()))
    k, n = ProductWeights(workload, {}).shape
    plain = {"x @ W": (k, n), "x @ E.T": (n, k)}
    plain = {
        way: (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * slices for way, shape in plain.items()
    }
    x = [jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)] * calls
    indices = [jax.ShapeDtypeStruct((), jnp.int32)] * calls
    return product_calls(ProductWeights(workload, plain), x, indices, chained=False), 2 * k * n


def describe(
    name: str, function, arguments, block_bytes: int, min_graph_size: int = 5, **options
) -> dict:
    """Compiles for the H100; any smaller number of launches does not make a CUDA graph."""
    with tempfile.TemporaryDirectory() as folder:
        options = dump_options(folder, min_graph_size) | options
        jitted = jax.jit(function, compiler_options=options)
        compiled = jitted.lower(*placed(arguments)).compile()
        thunks = read_thunks(folder)
    text = compiled.as_text()
    moved = re.findall(r"= (\w+\[[\d,]*\])\S* (?:copy|dynamic-slice)\(", text)
    return {
        "program": name,
        "temporary_blocks": compiled.memory_analysis().temp_size_in_bytes / block_bytes,
        "decode_calls": text.count('custom_call_target="df11_decode"'),
        "fused": is_fused_in(compiled),
        "product_calls": text.count('custom_call_target="df11_product"'),
        "cublas_calls": text.count('custom_call_target="__cublas$'),
        "copied_or_sliced": sorted(set(moved)),
        "step": loop_body(thunks),
        "in_graph": decoder_in_graph(thunks),
    }


def programs():
    """(name, function, arguments, bytes of a block, further options) of each program."""
    shapes = {"up": (1024, 4096), "down": (4096, 1024)}
    block_bytes = 2 * 2 * 1024 * 4096
    x = jax.ShapeDtypeStruct((BATCH, 1024), jnp.bfloat16)
    for kind in (plain, compressed):
        params = {name: kind(8, shape) for name, shape in shapes.items()}

        def scan(x, p):
            return df11_jax.scan_blocks(two_matrices, x, p)[0]

        def token_loop(x, p):
            return jax.lax.fori_loop(0, TOKENS, lambda _, x: scan(x, p), x)

        yield f"scan_{kind.__name__}", scan, (x, params), block_bytes, {}
        yield f"token_loop_{kind.__name__}", token_loop, (x, params), block_bytes, {}

    block = BLOCKS["Llama-3.1-8B"]
    params = {name: compressed(block.layers, shape) for name, shape in block.matrices.items()}
    x = jax.ShapeDtypeStruct((BATCH, block.hidden), jnp.bfloat16)

    def llama(x, p):
        return df11_jax.scan_blocks(transformer_block, x, p)[0]

    def llama_decoding(x, p):
        return df11_jax.scan_blocks(trivial_block, x, p)[0]

    yield "llama_8b", llama, (x, params), 2 * block.size, {}
    scalar = jax.ShapeDtypeStruct((), jnp.bfloat16)
    yield "llama_8b_decoding", llama_decoding, (scalar, params), 2 * block.size, {}

    def one_call(p):
        return df11_jax.decompress_params(p)

    small = {f"w{i}": compressed(1, (64, 64)) for i in range(18)}
    yield "small_tensors", one_call, (small,), 18 * 2 * 64 * 64, {"min_graph_size": 1}

    for name, rows in (("qkv", 1), ("gate_up", 64)):
        ways, matrix_bytes = products(name, rows)
        for way, calls in ways.items():
            yield f"{name} {way}", *calls, matrix_bytes, compiler_options("gpu")


def main() -> None:
    wanted = sys.argv[1:]
    for name, function, arguments, block_bytes, options in programs():
        if not wanted or name in wanted:
            print(json.dumps(describe(name, function, arguments, block_bytes, **options)))


if __name__ == "__main__":
    main()
