"""Other decoders, measured where they are installed."""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from df11_jax.bench.timing import Effort
from df11_jax.bench.workload import draw

# Of the published layout, which its kernel knows as constants.
_THREADS_PER_BLOCK = 512
_BYTES_PER_THREAD = 8


def missing_peers() -> dict[str, str]:
    """How to install each decoder that could be measured on this platform but is not here."""
    wanted = {
        "cpu": {"ZipNN": {"zipnn": "zipnn"}},
        "gpu": {"DFloat11 kernel": {"dfloat11": "--no-deps dfloat11", "cupy": "cupy-cuda13x"}},
    }
    missing = {}
    for peer, packages in wanted.get(jax.default_backend(), {}).items():
        lacking = [what for module, what in packages.items() if not _is_installed(module)]
        if lacking:
            missing[peer] = " and ".join(f"pip install {what}" for what in lacking)
    return missing


def measure_zipnn(weights: int) -> dict[str, Any]:
    """ZipNN and the CPU decoder on one thread each, in a process of their own.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-P", "-m", "df11_jax.bench.one_thread", str(weights)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"measuring ZipNN failed:\n{result.stderr}")
    return json.loads(result.stdout)


def measure_dfloat11(weights: int, effort: Effort) -> dict[str, Any]:
    """The kernel that the dfloat11 package ships, launched by CuPy.

    Args:
        weights: the number of weights, which are drawn like ours.
        effort: the number and the length of the timings.

    Returns:
        Some of the figures that `Decoding` has.

    Raises:
        RuntimeError: the kernel does not give back what was encoded, or cannot be launched.
    """
    import cupy

    from df11_jax.published import encode_unit

    original = np.asarray(draw(jax.random.key(0), (weights,)))
    unit = encode_unit({"weights": original})
    positions = np.asarray(unit.output_positions, np.uint32)
    # A count and a place for what it decodes, of each thread and of each weight of a block.
    most = int(np.diff(np.append(positions, np.uint32(weights))).max())
    shared = 4 * _THREADS_PER_BLOCK + 4 + 2 * most
    if shared > 48 * 1024:
        raise RuntimeError(f"it asks for {shared} bytes of shared memory, and gets 49152 at most")
    spec = importlib.util.find_spec("dfloat11")
    assert spec is not None and spec.submodule_search_locations is not None
    ptx = pathlib.Path(spec.submodule_search_locations[0]) / "decode.ptx"
    decode = cupy.RawModule(path=str(ptx)).get_function("decode")

    arrays = (unit.luts, unit.encoded_exponent, unit.sign_mantissa, positions, unit.gaps)
    operands = [cupy.asarray(np.ascontiguousarray(array)) for array in arrays]
    out = cupy.empty(weights, np.uint16)
    encoded_bytes = operands[1].size
    blocks = -(-encoded_bytes // (_THREADS_PER_BLOCK * _BYTES_PER_THREAD))
    counts = (np.uint32(len(unit.luts)), np.uint32(encoded_bytes), np.uint32(weights))

    def launch(times: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        for _ in range(times):
            decode((blocks,), (_THREADS_PER_BLOCK,), (*operands, out, *counts), shared_mem=shared)
        end.record()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(begin, end) / 1e3

    launch(1)
    if not np.array_equal(cupy.asnumpy(out), original.view(np.uint16)):
        raise RuntimeError("it does not give back what was encoded")
    times = max(1, round(effort.warm_up / launch(3) * 3))
    launch(times)
    times = max(1, round(effort.seconds / launch(3) * 3))
    seconds = [launch(times) / times for _ in range(effort.repeats)]
    compressed = sum(array.nbytes for array in operands)
    return {
        "name": "DFloat11 kernel",
        "weights": weights,
        "bits_per_weight": 8 * compressed / weights,
        "seconds": seconds,
        "output_bytes_per_second": 2 * weights / statistics.median(seconds),
    }


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
