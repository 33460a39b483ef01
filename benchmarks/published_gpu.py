"""How fast is a published unit decoded on a GPU, beside the reference implementation's kernel?

    pip install ".[benchmark]" cupy-cuda13x
    pip install --no-deps dfloat11
    python benchmarks/published_gpu.py

Both decode the same unit, of the weights of a Llama-3.1-8B block, in turn and in one process. The
reference kernel is the `decode.ptx` of the installed `dfloat11`, launched as that package does.
Prints bytes of bfloat16 per second, and what the GPU's clocks were.
"""

import importlib.util
import os
import pathlib
import statistics
import subprocess
import time

import click

# Rows and columns of q, k, v, o, gate, up, down.
SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
SHAPES += [(14336, 4096), (14336, 4096), (4096, 14336)]
REFERENCE_THREADS = 512
REFERENCE_BLOCK_BYTES = 4096
CALLS = 20  # that are timed together


@click.command()
@click.option("--repeats", default=7, show_default=True)
def main(repeats: int) -> None:
    """Checks and times both kernels."""
    ptx = _reference_ptx()
    # JAX would take most of the memory, and CuPy needs some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np

    from df11_jax import _ffi, published

    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        raise SystemExit(f"JAX sees no CUDA device: {error}") from None
    if problem := _ffi.find_obstacle("cuda"):
        raise SystemExit(f"df11_jax was built without its CUDA decoder: {problem}")
    try:
        import cupy
    except ImportError as error:
        raise SystemExit(f"needs CuPy to launch the reference kernel: {error}") from None

    draws = np.random.default_rng(0)
    tensors = {
        f"w{i}": (draws.standard_normal(shape, dtype=np.float32) * np.float32(0.02)).astype(
            ml_dtypes.bfloat16
        )
        for i, shape in enumerate(SHAPES)
    }
    original = np.concatenate([w.view(np.uint16).reshape(-1) for w in tensors.values()])
    unit = published.encode_unit(tensors)
    bits = 8 * unit.compressed_nbytes / unit.size
    print(f"{device.device_kind}: {unit.size / 1e6:.1f} M normal weights, {bits:.3f} bits/weight")

    result = jax.ShapeDtypeStruct((unit.size,), jnp.bfloat16)
    call = jax.ffi.ffi_call(_ffi.PUBLISHED_DECODE_TARGET, result)
    decode = jax.jit(lambda arrays: call(*arrays, name="unit"))
    arrays = jax.device_put(unit.arrays, device)

    def run_ours():
        for _ in range(CALLS):
            out = decode(arrays)
        return jax.block_until_ready(out)

    kernel = cupy.RawModule(path=str(ptx)).get_function("decode")
    positions = unit.output_positions.astype(np.int64)
    stream_bytes = unit.encoded_exponent.size
    blocks = -(-stream_bytes // REFERENCE_BLOCK_BYTES)
    if len(positions) != blocks + 1:
        raise SystemExit("the reference kernel reads a position more than this unit has")
    shared_bytes = 4 * REFERENCE_THREADS + 4 + 2 * int(np.diff(positions).max())
    on_gpu = {name: cupy.asarray(getattr(unit, name)) for name in published._unit.ARRAYS}
    out = cupy.empty(unit.size, np.uint16)
    order = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
    sizes = map(np.int32, (len(unit.luts), stream_bytes, unit.size))
    arguments = (*(on_gpu[name] for name in order), out, *sizes)

    def run_reference():
        for _ in range(CALLS):
            kernel((blocks,), (REFERENCE_THREADS,), arguments, shared_mem=shared_bytes)
        cupy.cuda.Device().synchronize()
        return out

    # These calls also compile.
    right = np.array_equal(np.asarray(run_ours()).view(np.uint16), original)
    reference_right = np.array_equal(cupy.asnumpy(run_reference()), original)
    print(f"bit-exact: ours {right}, reference {reference_right}")

    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(repeats):
        for name, run in (("ours", run_ours), ("reference", run_reference)):
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / CALLS)
            print(f"  {name:9} {unit.nbytes / seconds[name][-1] / 1e9:7.1f} GB/s  {_clocks()}")
    middle = {name: unit.nbytes / statistics.median(times) for name, times in seconds.items()}
    for name, rate in middle.items():
        print(f"{name:9} {rate / 1e9:7.1f} GB/s of bfloat16, median of {repeats}")
    print(f"ours / reference: {middle['ours'] / middle['reference']:.2f}")
    if not (right and reference_right):
        raise SystemExit("a kernel did not give back the weights")


def _reference_ptx() -> pathlib.Path:
    """The reference kernel. Its package is not imported: that would import torch and more."""
    spec = importlib.util.find_spec("dfloat11")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (ptx := pathlib.Path(folder) / "decode.ptx").exists():
            return ptx
    raise SystemExit("needs the reference kernel: pip install --no-deps dfloat11")


def _clocks() -> str:
    """Clocks now, as nvidia-smi knows them."""
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    try:
        result = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return "(no nvidia-smi)"
    return f"(SM, most, memory, degrees: {result.stdout.strip()})"


if __name__ == "__main__":
    main()
