"""Decodes under JAX with the libraries that Bazel built: see BUILD.bazel."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import df11_jax
from df11_jax import _cpu_library, _ffi


def weights(count: int) -> jax.Array:
    """As they are trained, and where there is room, every bit pattern."""
    values = jax.random.normal(jax.random.key(count), (count,), jnp.bfloat16)
    bits = np.array(values.view(jnp.uint16))
    if count >= 1 << 16:
        bits[: 1 << 16] = np.arange(1 << 16)
    return jnp.asarray(bits).view(jnp.bfloat16)


def check_decoding() -> None:
    decompress = jax.jit(df11_jax.decompress)
    for count in (0, 1, 7, 4095, 4097, 1 << 20):
        expected = weights(count)
        compressed = df11_jax.compress(expected)
        assert "df11_decode" in decompress.lower(compressed).as_text(), "decoded by XLA alone"
        actual = decompress(compressed)
        np.testing.assert_array_equal(actual.view(jnp.uint16), expected.view(jnp.uint16))


def main() -> None:
    built = pathlib.Path.cwd() / "df11_jax"
    library = pathlib.Path(_cpu_library.__file__)
    assert library.parent == built, f"{library} is not of {built}"
    for platform in ("cpu", "cuda"):
        if platform == "cuda" and not (built / "_cuda_library.so").exists():
            continue
        problem = _ffi.find_obstacle(platform)
        assert problem is None, problem
        try:
            device = jax.devices(platform)[0]
        except RuntimeError:
            print(f"{platform}: the library loads; there is no device")
            continue
        with jax.default_device(device):
            check_decoding()
        print(f"{platform}: decoded, bit for bit")


if __name__ == "__main__":
    main()
