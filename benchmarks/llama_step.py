"""How long the matrix products of a step of Llama-3.1-8B take, with plain and compressed weights.

    python benchmarks/llama_step.py            all ways, each in a process, with 1 to 256 rows
    python benchmarks/llama_step.py dot 8 16   one way, with 8 and with 16 rows

`dot` multiplies compressed weights without decompressing them, `decode` decompresses each layer
first; `plain` has q, k and v in one matrix, and gate and up in another, `plain7` each alone. XLA
reads its flags once a process: where cuBLAS is to read plain stacks in place, all ways but
`plain-default` have --xla_gpu_enable_triton_gemm=false. Attention itself is left out.
"""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import df11_jax

WAYS = ("dot", "decode", "plain", "plain7", "plain-default")
ROWS = (1, 8, 16, 32, 64, 256)
LAYERS, STEPS, D, HIDDEN = 32, 32, 4096, 14336
SHAPES = {
    "q": (D, D),
    "k": (D, D // 4),
    "v": (D, D // 4),
    "o": (D, D),
    "gate": (D, HIDDEN),
    "up": (D, HIDDEN),
    "down": (HIDDEN, D),
}
MERGED_SHAPES = {
    "qkv": (D, 3 * D // 2),
    "o": (D, D),
    "gate_up": (D, 2 * HIDDEN),
    "down": (HIDDEN, D),
}


def draw(i, shape):
    key = jax.random.fold_in(jax.random.key(0), i)
    return (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16)


def normalize(x):
    squares = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return x * jax.lax.rsqrt(squares + 1e-6).astype(x.dtype)


def block(x, multiply):
    """`multiply(x, names)` gives the products with the matrices of these names."""
    q, k, v = multiply(normalize(x), ["q", "k", "v"])
    mixed = q + jnp.tile(k, (1, 4)) + jnp.tile(v, (1, 4))
    x = x + multiply(mixed, ["o"])[0]
    gate, up = multiply(normalize(x), ["gate", "up"])
    return x + multiply(jax.nn.silu(gate) * up, ["down"])[0]


def compressed_stacks():
    """All layers have the same weights, in memory of their own."""
    stacks = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        one = df11_jax.compress(np.asarray(draw(i, shape))[None], stack_axes=1)
        stacks[name] = jax.tree.map(lambda part: jnp.repeat(jnp.asarray(part), LAYERS, 0), one)
    return stacks


def step_of(way):
    """A function of x and stacks, and the stacks."""
    if way in ("dot", "decode"):

        def compressed(x, w, _):
            def multiply(x, names):
                if way == "dot":
                    return df11_jax.dot(x, [w[name] for name in names])
                return [x @ w[name] for name in names]

            return block(x, multiply), None

        lazy = way == "dot"
        scan = lambda x, stacks: df11_jax.scan_blocks(compressed, x, stacks, lazy=lazy)[0]  # noqa: E731
        return scan, compressed_stacks()
    shapes = SHAPES if way == "plain7" else MERGED_SHAPES
    stacks = {name: jnp.stack([draw(i, s)] * LAYERS) for i, (name, s) in enumerate(shapes.items())}

    def plain(x, w):
        def multiply(x, names):
            if names == ["q", "k", "v"] and "qkv" in w:
                return jnp.split(x @ w["qkv"], [D, D + D // 4], -1)
            if names == ["gate", "up"] and "gate_up" in w:
                return jnp.split(x @ w["gate_up"], 2, -1)
            return [x @ w[name] for name in names]

        return block(x, multiply), None

    return lambda x, stacks: jax.lax.scan(plain, x, stacks)[0], stacks


def measure(way, counts):
    step, stacks = step_of(way)
    for rows in counts:
        measure_rows(way, rows, step, stacks)


def measure_rows(way, rows, step, stacks):
    steps = lambda x, stacks: jax.lax.fori_loop(0, STEPS, lambda _, x: 0.5 * step(x, stacks), x)  # noqa: E731
    x = jnp.ones((rows, D), jnp.bfloat16)
    program = jax.jit(steps).lower(x, stacks).compile()
    jax.block_until_ready(program(x, stacks))
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        jax.block_until_ready(program(x, stacks))
        times.append((time.perf_counter() - begin) / STEPS)
    memory = program.memory_analysis()
    print(
        f"{way:13} {rows:3} rows: {1e3 * min(times):6.3f} ms a step, "
        f"arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, "
        f"temporary {memory.temp_size_in_bytes / 1e6:.1f} MB",
        flush=True,
    )


def main():
    if len(sys.argv) > 1:
        measure(sys.argv[1], map(int, sys.argv[2:]))
        return
    for way in WAYS:
        flags = os.environ.get("XLA_FLAGS", "")
        if way != "plain-default":
            flags += " --xla_gpu_enable_triton_gemm=false"
        # With more rows than 32, `dot` is `decode`.
        counts = [str(rows) for rows in ROWS if way != "dot" or rows <= 32]
        command = [sys.executable, __file__, way, *counts]
        subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": flags})


if __name__ == "__main__":
    main()
