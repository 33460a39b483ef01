"""The CUDA decoders on a GPU, through XLA and alone: `pytest -m gpu`."""

import dataclasses
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from compiling import ROOT
from payloads import assert_same_bits, bits, random_weights
from thunks import decoder_in_graph, dump_options, read_thunks

from df11_jax import (
    _ffi,
    compress,
    decompress,
    decompress_params,
    dot,
    published,
    scan_blocks,
)
from df11_jax._product import MOST_FUSED_ROWS
from df11_jax._slices import decode_slices
from df11_jax.bench.blocks import BLOCKS
from df11_jax.bench.measure import DECODE_KERNEL
from df11_jax.bench.programs import Program
from df11_jax.bench.timing import kernel_durations
from df11_jax.bench.workload import make_workload
from df11_jax.cli import _commands


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
    assert _ffi.find_obstacle("cuda") is None, "df11_jax was built without its CUDA decoder"
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
    monkeypatch.setattr(_ffi, "platforms", lambda target: ())
    assert_same_bits(jax.jit(lambda a: decompress(a))(stack), compiled)


def float64(array):
    return np.asarray(array, np.float64)


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("shape", [(2048, 2048), (4096, 512), (1072, 2040)])
def test_dot(shape, along_columns):
    """Right sums, the same bits for a row in every batch, and each time."""
    weights = random_weights(shape)
    array = compress(weights, along_columns=along_columns)
    w = float64(weights).T if along_columns else float64(weights)
    x = jnp.asarray(random_weights((32, w.shape[0]), 1, scale=1))
    fused = jax.jit(lambda x: dot(x, array, preferred_element_type=jnp.float32))
    assert "df11_product" in fused.lower(x).as_text()
    found = np.asarray(fused(x))
    allowed = 1e-5 * (np.abs(float64(x)) @ np.abs(w))
    assert (np.abs(found - float64(x) @ w) <= allowed).all()
    for rows in (1, 2, 8, 12, 16, 17):
        for _ in range(10):
            again = np.asarray(fused(x[:rows]))
            np.testing.assert_array_equal(again.view(np.uint32), found[:rows].view(np.uint32))


def test_dot_in_a_scan_is_captured(tmp_path):
    stacks = {f"w{i}": random_weights((3, 256, 256), i) for i in range(3)}
    small = {name: compress(stack, stack_axes=1) for name, stack in stacks.items()}
    x = jnp.asarray(random_weights((4, 256), 9, scale=1))

    def step(x, params):
        def block(x, w, _):
            y, z = dot(x, [w["w0"], w["w1"]])
            return dot((y + z).astype(jnp.bfloat16), w["w2"]), y

        return scan_blocks(block, x, params, lazy=True)[1]

    out = jax.jit(step, compiler_options=dump_options(tmp_path, min_graph_size=1))(x, small)
    first = np.asarray(dot(x, compress(stacks["w0"][0])))
    assert_same_bits(np.asarray(out)[0], first)
    assert decoder_in_graph(read_thunks(tmp_path)), read_thunks(tmp_path)


def test_corrupt_columns_of_a_product_are_nan():
    array = compress(random_weights((256, 128)))
    # Where the first column's first chunk ends, and the second's begins.
    offsets = array.chunk_offsets.at[..., 1].add(1)
    bad = dataclasses.replace(array, chunk_offsets=offsets)
    x = jnp.ones((2, 256), jnp.bfloat16)
    assert not np.isnan(np.asarray(dot(x, array), np.float32)).any()
    assert np.isnan(np.asarray(dot(x, bad), np.float32)).all()


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


@pytest.mark.parametrize("model", BLOCKS)
def test_block_shapes(model):
    # Fails unless every bit comes back, through jit and one call for all seven matrices.
    assert make_workload(model, BLOCKS[model].matrices, 1).weights == BLOCKS[model].size


@pytest.mark.parametrize("in_loop", [False, True])
def test_in_a_cuda_graph(in_loop, tmp_path):
    """XLA captures the call, and what it replays reads index and payload anew."""
    stacks = {f"w{i}": random_weights((3, 256, 64 + 64 * i), i) for i in range(7)}
    small = {name: compress(stack, stack_axes=1) for name, stack in stacks.items()}
    reversed_stacks = {name: stack[::-1] for name, stack in stacks.items()}
    reversed_small = {name: compress(s, stack_axes=1) for name, s in reversed_stacks.items()}

    def decode(arrays, index):
        if not in_loop:
            return dict(zip(arrays, decode_slices(list(arrays.values()), index), strict=True))
        return scan_blocks(lambda _, weights, __: (index, weights), index, arrays)[1]

    jitted = jax.jit(decode, compiler_options=dump_options(tmp_path, min_graph_size=1))
    for _ in range(3):
        for expected, arrays in ((stacks, small), (reversed_stacks, reversed_small)):
            for index in range(3):
                out = jitted(arrays, jnp.int32(index))
                for name, weights in out.items():
                    stack = expected[name]
                    assert_same_bits(weights, stack if in_loop else stack[index])
    assert decoder_in_graph(read_thunks(tmp_path)), read_thunks(tmp_path)


@pytest.mark.parametrize(("tensors", "launches"), [(1, 1), (17, 1), (18, 2)])
def test_small_tensors_take_one_launch(tensors, launches):
    small = {f"w{i}": compress(random_weights((64, 64), i)) for i in range(tensors)}
    decode = jax.jit(decompress_params)
    try:
        durations = kernel_durations(Program(lambda: decode(small), 1), DECODE_KERNEL)
    except RuntimeError as error:
        if "CUPTI" not in str(error):
            raise
        pytest.skip(str(error))
    assert len(durations) == launches


def test_bench():
    result = CliRunner().invoke(_commands.commands, ["bench", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    print(result.stdout)
    report = json.loads(result.stdout)
    assert report["device"]["platform"] == "gpu"
    assert report["device"]["decoder"] == "compiled"
    for decoding in report["decodings"]:
        assert 10.5 < decoding["bits_per_weight"] < 10.9
        assert 0 < decoding["share_of_limit"] < 1.5
    assert report["scan"]["blocks"] == 8


def test_bench_product():
    result = CliRunner().invoke(_commands.commands, ["bench", "--product", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    print(result.stdout)
    report = json.loads(result.stdout)
    assert not report["skipped"]
    can_fuse = bool(_ffi.product_platforms())
    for product in report["products"]:
        assert product["is_fused"] == (can_fuse and product["rows"] <= MOST_FUSED_ROWS)
        if product["timed_by"] == "kernels":
            assert (product["fused_seconds"] is not None) == product["is_fused"]


def test_doctor():
    result = CliRunner().invoke(_commands.commands, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (gpu,) = (backend for backend in found["backends"] if backend["platform"] == "cuda")
    assert gpu["decoder"] == "compiled, CUDA"
    tested = {(test["platform"], test["decoder"], test["layout"]) for test in found["self_tests"]}
    assert {("cuda", "CUDA", layout) for layout in ("native", "published")} < tested
    assert (("cuda", "fused product", "native") in tested) == bool(_ffi.product_platforms())
    assert all(test["error"] is None for test in found["self_tests"])


def test_compare(tmp_path, monkeypatch):
    """Plain, compressed and partly offloaded weights generate the same; two ways are measured."""
    # This process and those that measure share the memory of the GPU.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    file.write_text(json.dumps({"model_type": "llama", "vocab_size": 8192, **sizes, **heads}))
    options = ["--batch", "1", "--batch", "8", "--memory", "800MB", "--json"]
    result = CliRunner().invoke(_commands.commands, ["compare", str(file), *options])
    assert result.exit_code == 0, result.output
    print(result.stdout)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    rows = [event for event in events if event["event"] == "row"]
    found = {(row["xla"], row["weights"], row["batch"]): row for row in rows}
    assert len(found) == len(rows)
    fused = found["default", "compressed", 1]["fused"]
    names = ["exact" if fused else "compressed", "plain", "offloaded"]
    assert events[-1]["equal"] == {"1": names, "8": names}
    assert not events[-1]["errors"]
    for batch in (1, 8):
        assert found["default", names[0], batch]["decompress_seconds"]
        plain = found["default", "plain", batch]["plan"]["peak"]
        for name in (names[0], "offloaded"):
            assert found["default", name, batch]["plan"]["peak"] < plain
        assert {found["cublas", name, batch]["not_run"] for name in ("compressed", "plain")} == {
            None
        }
    assert events[-1]["longest"]["plain"] == 2048


@pytest.mark.parametrize("tool", ["", "memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.parametrize(
    ("driver", "kernel"),
    [
        ("native/kernel_test.cc", "native/cuda/decode.cu"),
        ("native/product_test.cc", "native/cuda/product.cu"),
        ("published/kernel_test.cc", "published/cuda/decode.cu"),
    ],
)
def test_driver(driver, kernel, tool, tmp_path):
    """The drivers that the emulation runs, with the real kernels, also under compute-sanitizer."""
    for needed in ("nvcc", *(["compute-sanitizer"] if tool else [])):
        if not shutil.which(needed):
            pytest.skip(f"needs {needed} on PATH")
    program = tmp_path / "driver"
    command = ["nvcc", "-std=c++17", "-arch=native", "-Ixla_ffi"]
    # The product as it is for older GPUs, too.
    command += ["-DDF11_LANE_COPIES_EVERYWHERE", "-diag-suppress=1675", "-x", "cu", "-o", program]
    command += [f"tests/xla_ffi/{driver}", f"xla_ffi/{kernel}"]
    subprocess.run(command, cwd=ROOT, check=True)
    check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if tool else []
    if tool in ("racecheck", "synccheck"):
        # What the tool finds out by itself may be too few: a block has up to 4 a warp.
        check += ["--num-cuda-barriers", "128"]
    # Under a tool, damage is tried less often: it takes a hundred times as long.
    command = [*check, program, "10" if tool else "100"]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout)
    if tool and "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout + result.stderr
