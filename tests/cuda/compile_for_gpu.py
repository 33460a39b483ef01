"""Compiles a scan of compressed blocks for an H100, without one, and describes the result.

    pip install "jax[cuda13]"
    python tests/cuda/compile_for_gpu.py

Prints one line of JSON a program: temporary memory in dense blocks, calls of the decoder, and the
shapes of all that is copied or sliced.
"""

import json
import os
import re

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import df11_jax

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
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
LAYERS, WIDTH, BATCH, TOKENS = 8, 1024, 4, 5


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    draws = np.random.default_rng(0)

    def weights(*shape):
        values = draws.standard_normal((LAYERS, *shape), dtype=np.float32)
        return (values * np.float32(0.02)).astype(jnp.bfloat16)

    plain = {"up": weights(WIDTH, 4 * WIDTH), "down": weights(4 * WIDTH, WIDTH)}
    block = sum(array[0].nbytes for array in plain.values())

    def block_fn(x, p, _):
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

    def scan(x, p):
        return df11_jax.scan_blocks(block_fn, x, p)[0]

    def token_loop(x, p):
        return jax.lax.fori_loop(0, TOKENS, lambda _, x: scan(x, p), x)

    x = jnp.ones((BATCH, WIDTH), jnp.bfloat16)
    trees = {"plain": plain, "compressed": df11_jax.compress_params(plain, stacked=".")}
    for program in (scan, token_loop):
        for name, params in trees.items():
            arguments = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (x, params)
            )
            compiled = jax.jit(program).lower(*arguments).compile()
            text = compiled.as_text()
            moved = re.findall(r"= (\w+\[[\d,]*\])\S* (?:copy|dynamic-slice)\(", text)
            print(
                json.dumps(
                    {
                        "program": program.__name__,
                        "weights": name,
                        "temporary_blocks": compiled.memory_analysis().temp_size_in_bytes / block,
                        "decode_calls": text.count('custom_call_target="df11_decode"'),
                        "copied_or_sliced": sorted(set(moved)),
                    }
                )
            )


if __name__ == "__main__":
    main()
