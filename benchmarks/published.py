"""How fast is the published layout encoded, beside the reference's encoder, and decoded on a CPU?

    pip install . && python benchmarks/published.py

All is on one core, alternating, in one process. The reference's encoder takes part if it is
installed: see dfloat11_encoder.py. Nothing is asserted here but that bits are right.
"""

import argparse
import contextlib
import io
import os
import statistics
import time

MEGA = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=64, help="in 2^20")
    parser.add_argument("--reference-weights", type=int, default=2, help="in 2^20")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    encode_beside_reference(options.reference_weights * MEGA, options.repeats)
    encode_and_decode(options.weights * MEGA, options.repeats)


def encode_beside_reference(size: int, repeats: int) -> None:
    try:
        import dfloat11_encoder

        reference = dfloat11_encoder.load_reference()
    except (ImportError, AssertionError) as error:
        print(f"without the reference's encoder, which is not installed ({error})")
        return
    import numpy as np

    from df11_jax.published import encode_unit

    weights = normal(size)
    timings = Timings(weights.nbytes)
    for _ in range(repeats):
        # Without its progress bar, which would make it slower.
        with contextlib.redirect_stdout(io.StringIO()):
            made = timings.time(
                "reference", lambda: dfloat11_encoder.encode(reference, [weights.view(np.uint16)])
            )
        unit = timings.time("encode_unit", lambda: encode_unit({"w": weights}, threads=1))
        for name in ("encoded_exponent", "luts", "output_positions", "gaps", "sign_mantissa"):
            np.testing.assert_array_equal(getattr(unit, name), made[name])
    print(f"encoding {size / MEGA:.0f} M normal weights, codebook included")
    timings.report()
    print(f"  encode_unit: {timings.best('encode_unit') / timings.best('reference'):.0f} times")


def encode_and_decode(size: int, repeats: int) -> None:
    import jax
    import numpy as np

    from df11_jax import published
    from df11_jax.published._unit import decode_host

    weights = normal(size)
    bits = weights.view(np.uint16)
    timings = Timings(weights.nbytes)
    decompress = jax.jit(lambda unit: published.decompress(unit)["w"])
    # The first round compiles.
    for _ in range(repeats + 1):
        out = None
        unit = timings.time("encode_unit", lambda: published.encode_unit({"w": weights}, threads=1))
        on_device = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, unit))
        out = timings.time("decode_host", lambda u=unit: decode_host(u, threads=1))
        np.testing.assert_array_equal(out.view(np.uint16), bits)
        out = None  # so that the next finds its memory
        out = timings.time(
            "decompress, jitted", lambda u=on_device: jax.block_until_ready(decompress(u))
        )
        np.testing.assert_array_equal(np.asarray(out).view(np.uint16), bits)
    print(
        f"{size / MEGA:.0f} M normal weights, {8 * unit.compressed_nbytes / size:.3f} bits/weight"
    )
    timings.report()


class Timings:
    """Rates of alternating functions, in bytes of bfloat16 per second."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._rates: dict[str, list[float]] = {}

    def time(self, name, function):
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        self._rates.setdefault(name, []).append(self._nbytes / seconds)
        return result

    def best(self, name: str) -> float:
        return max(self._rates[name])

    def report(self) -> None:
        for name, rates in self._rates.items():
            middle = statistics.median(rates)
            print(f"  {name:20} {max(rates) / 1e9:8.4f} GB/s  (median {middle / 1e9:.4f})")


def normal(size: int):
    import ml_dtypes
    import numpy as np

    draws = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    return (draws * np.float32(0.02)).astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    main()
