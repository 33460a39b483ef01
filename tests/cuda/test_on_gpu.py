"""The CUDA decoders on a GPU, through XLA and alone: `pytest -m gpu`."""

import dataclasses
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import ROOT
from payloads import assert_same_bits, bits, random_weights

from df11_jax import _ffi, compress, decompress, published, scan_blocks


def has_gpu() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device that JAX sees"),
]


@pytest.fixture(autouse=True)
def on_gpu():
    assert _ffi.register("cuda") is None, "df11_jax was built without its CUDA decoder"
    with jax.default_device(jax.devices("cuda")[0]):
        yield


def noise(shape):
    values = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    return values.view(jnp.bfloat16)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (1,), (63,), (8193,), (127, 64), (129, 72), (144, 448), (3, 5, 64), (4096, 4096)],
)
@pytest.mark.parametrize("make", [random_weights, noise])
def test_shapes(shape, make):
    weights = np.asarray(make(shape))
    assert_same_bits(decompress(compress(weights)), weights)


def test_all_bit_patterns():
    patterns = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16)
    weights = np.concatenate([np.asarray(random_weights((100_000,))), patterns])
    assert_same_bits(decompress(compress(weights)), weights)


def test_scan_blocks():
    stacks = {f"w{i}": random_weights((4, 256, 256), i) for i in range(20)}
    small = {name: compress(stack, stack_axes=1) for name, stack in stacks.items()}

    def block(x, params, _):
        return x, params

    _, out = jax.jit(lambda p: scan_blocks(block, jnp.zeros(()), p))(small)
    for name, stack in stacks.items():
        assert_same_bits(out[name], stack)


def test_same_bits_as_the_xla_decoder(monkeypatch):
    stack = compress(random_weights((3, 200, 128)), stack_axes=1)
    compiled = decompress(stack)
    monkeypatch.setattr(_ffi, "platforms", lambda: ())
    assert_same_bits(jax.jit(lambda a: decompress(a))(stack), compiled)


def test_corrupt_chunks_are_poisoned():
    weights = random_weights((256, 64))
    array = compress(weights)
    bad = dataclasses.replace(array, sign_mantissa=array.sign_mantissa.at[2100].add(1))
    out = bits(decompress(bad))
    np.testing.assert_array_equal(out[:128], bits(weights)[:128])
    assert (out[128:] == 0xFFFF).all()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 12_345, 3_000_001])
@pytest.mark.parametrize("scale", [0.02, 1e30])
def test_published_sizes(size, scale):
    weights = np.asarray(random_weights((size,), scale=scale))
    unit = published.encode_unit({"w": weights})
    assert_same_bits(published.decompress(unit)["w"], weights)


def test_published_tensors_in_jit():
    tensors = {f"w{i}": np.asarray(random_weights((64, 33 + i), i)) for i in range(3)}
    unit = jax.device_put(published.encode_unit(tensors))
    out = jax.jit(published.decompress)(unit)
    for name, weights in tensors.items():
        assert_same_bits(out[name], weights)


def test_corrupt_published_blocks_are_poisoned():
    weights = np.asarray(random_weights((60_000,)))
    unit = published.encode_unit({"w": weights})
    gaps = unit.gaps.copy()
    gaps[320:640] ^= 0xFF  # of the second block: where its first code starts, too
    out = bits(published.decompress(dataclasses.replace(unit, gaps=gaps))["w"])
    third_block = unit.output_positions[2]
    # The first block does not end where the second should begin.
    assert (out[:third_block] == 0xFFFF).all()
    np.testing.assert_array_equal(out[third_block:], bits(weights)[third_block:])


@pytest.mark.parametrize("tool", ["", "memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("driver", "source"), [("kernel_test", "decode"), ("published_kernel_test", "published")]
)
def test_driver(driver, source, tool, tmp_path):
    """The drivers that the emulation runs, with the real kernels, also under compute-sanitizer."""
    for program in ("nvcc", *(["compute-sanitizer"] if tool else [])):
        if not shutil.which(program):
            pytest.skip(f"needs {program} on PATH")
    program = tmp_path / driver
    command = ["nvcc", "-std=c++17", "-arch=native", "-Ixla_ffi", "-Itests"]
    command += ["-diag-suppress=1675", "-x", "cu", "-o", program]
    command += [f"tests/cuda/{driver}.cc", f"xla_ffi/cuda/{source}.cu"]
    subprocess.run(command, cwd=ROOT, check=True)
    check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if tool else []
    result = subprocess.run([*check, program], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
