"""ZipNN and the CPU decoder on one thread: `python -m df11_jax.bench.one_thread WEIGHTS`.

Prints one JSON object. A process of its own, because XLA's threads are as many as this may run on
when it starts.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_REPEATS = 5


def main() -> None:
    """Measures, and prints the figures."""
    weights = int(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    import jax
    import numpy as np
    from zipnn import ZipNN

    import df11_jax
    from df11_jax.bench.workload import draw

    original = np.asarray(draw(jax.random.key(0), (weights,)))
    raw = original.tobytes()
    compressed = df11_jax.compress(original)
    # ZipNN reorders bits in the buffer that it is given.
    packed = ZipNN(bytearray_dtype="bfloat16", threads=1).compress(bytearray(raw))
    decompress = jax.jit(df11_jax.decompress)

    best: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        return result

    for _ in range(_REPEATS):  # in turn, so that all meet the same machine
        ours = timed("df11_jax", lambda: jax.block_until_ready(decompress(compressed)))
        theirs = timed(
            "ZipNN", lambda: ZipNN(bytearray_dtype="bfloat16", threads=1).decompress(packed)
        )
        if np.asarray(ours).tobytes() != raw or bytes(theirs) != raw:
            sys.exit("the decompressed weights differ from the original")
        ours = theirs = None

    figures = {
        "name": "ZipNN",
        "weights": weights,
        "threads": 1,
        "bits_per_weight": 8 * len(packed) / weights,
        "output_bytes_per_second": len(raw) / best["ZipNN"],
        "df11_jax_bits_per_weight": 8 * compressed.compressed_nbytes / weights,
        "df11_jax_output_bytes_per_second": len(raw) / best["df11_jax"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
