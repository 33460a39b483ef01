"""Compiles programs with compressed blocks for an H100, without one, and describes the results.

    pip install "jax[cuda13]"
    python benchmarks/compile_for_gpu.py

Only shapes go in, so that models of any size can be compiled. Prints one line of JSON a program:
temporary memory in dense blocks, calls of the decoder, the shapes of all that is copied or sliced,
what runs in a step of the scan, and whether the decoder's call is in a CUDA graph.
"""

import json
import os
import re
import sys
import tempfile

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from thunks import decoder_in_graph, dump_options, loop_body, read_thunks

import df11_jax
from df11_jax import _layout
from df11_jax.bench.blocks import BLOCKS

# What XLA asks of a device when it compiles, from NVIDIA's data sheet of the H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BATCH, TOKENS = 4, 5
# Of the exponents; what weights drawn from a normal distribution take.
EXPONENT_BITS = 2.62


def compressed(layers: int, shape: tuple[int, int]) -> df11_jax.DF11Array:
    """The shapes of a compressed stack."""
    view = _layout.make_view(shape)
    exponents = round(view.size * EXPONENT_BITS / 32 / 4) * 4
    words = (
        _layout.HEADER_WORDS,
        _layout.CODEBOOK_WORDS,
        view.chunks + 1,
        exponents,
        view.sign_mantissa_words,
    )
    payload = (jax.ShapeDtypeStruct((layers, count), jnp.uint32) for count in words)
    return df11_jax.DF11Array(*payload, slice_shape=shape)


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


def describe(name: str, function, arguments, block_bytes: int, min_graph_size: int = 5) -> dict:
    """Compiles for the H100; any smaller number of launches does not make a CUDA graph."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        jitted = jax.jit(function, compiler_options=dump_options(folder, min_graph_size))
        compiled = jitted.lower(*arguments).compile()
        thunks = read_thunks(folder)
    text = compiled.as_text()
    moved = re.findall(r"= (\w+\[[\d,]*\])\S* (?:copy|dynamic-slice)\(", text)
    return {
        "program": name,
        "temporary_blocks": compiled.memory_analysis().temp_size_in_bytes / block_bytes,
        "decode_calls": text.count('custom_call_target="df11_decode"'),
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


def main() -> None:
    wanted = sys.argv[1:]
    for name, function, arguments, block_bytes, options in programs():
        if not wanted or name in wanted:
            print(json.dumps(describe(name, function, arguments, block_bytes, **options)))


if __name__ == "__main__":
    main()
