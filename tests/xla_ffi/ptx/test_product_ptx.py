"""Runs the fused product as nvcc compiles it, on a simulated device; needs no GPU."""

import ctypes
import dataclasses
import functools
import re
import subprocess

import count_sass
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import ROOT, needs_compiler, needs_nvcc
from device_memory import GlobalMemory, KernelError
from kernel_arguments import (
    RNG,
    UNWRITTEN,
    TensorSlices,
    compile_ptx,
    compressed,
    damaged,
    fill_tensor,
    sprinkled,
    unnoticed,
)
from ptx_kernel import SHARED_BASE, read_kernel
from ptx_machine import launch

from df11_jax._product import _in_kernel_order, workspace_words

pytestmark = [needs_nvcc, needs_compiler, pytest.mark.slow]


class ProductMatrix(ctypes.Structure):
    _fields_ = [
        ("slices", TensorSlices),
        ("out", ctypes.c_uint64),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_uint64),
        ("rows", ctypes.c_int),
        ("count", ctypes.c_int),
        ("matrices", ProductMatrix * 4),
        ("float_out", ctypes.c_bool),
        ("workspace", ctypes.c_uint64),
    ]


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a launch shares its work out; what it computes must not depend on it."""

    blocks: int = 2
    warps: int = 5
    shared_kib: int = 96
    items: tuple[int, int] = (0, 0)  # chunks of an item and items of a group, if not the usual


USUAL = Shares()

# What does not depend on how is copied.
bulk_only = pytest.mark.parametrize("ptx", ["90"], indirect=True)


# Before 9.0, lanes copy.
@pytest.fixture(scope="module", params=["80", "90"])
def ptx(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("product")
    return compile_ptx(folder, count_sass.PRODUCT_SOURCE, request.param)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    library = tmp_path_factory.mktemp("plan") / "plan.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += ["-Itests/xla_ffi/emulation", "-Ixla_ffi", "tests/xla_ffi/ptx/plan_product.cc"]
    subprocess.run([*command, "-o", library], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library)).plan


@pytest.fixture
def multiply(ptx, plan):
    return functools.partial(run_product, ptx, plan)


def architecture(ptx):
    return re.search(r"\.target sm_(\d+)", ptx)[1]


def run_product(ptx, plan, x, arrays, *, index=0, float_out=True, shares=USUAL):
    """The products of one launch: the bits of float32 or bfloat16."""
    memory, product = GlobalMemory(), Product()
    x = jnp.asarray(x, jnp.bfloat16)
    rows, product.float_out = x.shape[0], float_out
    product.x, product.rows = memory.allocate(np.asarray(_in_kernel_order(x))), rows
    kind = np.uint32 if float_out else np.uint16
    for array in arrays:
        matrix = product.matrices[product.count]
        view = fill_tensor(memory, matrix.slices, array, [index], {})
        matrix.slices.index, matrix.slices.batch_axes = product.matrices[0].slices.index, 0
        out = np.full((rows, view.batch * view.n), UNWRITTEN, kind)
        matrix.out = memory.allocate(out, writable=True)
        product.count += 1
    views = [array.layout.view for array in arrays]
    # More, where a test cuts items smaller.
    workspace = np.full(4 * workspace_words(views, rows), UNWRITTEN, np.uint32)
    product.workspace = memory.allocate(workspace, writable=True)
    columns = sum(view.batch * view.tiles_n for view in views)
    counters = memory.allocate(np.zeros(columns, np.uint32), writable=True)
    tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    kernel = read_kernel(ptx, f"product_kernelILi{tiles}E")
    parameter = ctypes.create_string_buffer(kernel.param_bytes)
    launched = (ctypes.c_int * 2)()
    end = plan(
        ctypes.byref(product),
        ctypes.c_void_p(counters),
        architecture(ptx) == "90",  # which has bulk copies
        shares.blocks,
        shares.warps,
        shares.shared_kib << 10,
        *shares.items,
        parameter,
        kernel.param_bytes,
        launched,
    )
    assert end
    launch(
        kernel,
        memory,
        parameter.raw,
        blocks=launched[0],
        threads=32 * launched[1],
        dynamic_shared=end - SHARED_BASE,
    )
    assert not memory.read_back(counters).any()
    outs = [memory.read_back(matrix.out) for matrix in product.matrices[: product.count]]
    return [out.view(kind).reshape(rows, -1) for out in outs]


def below_overflow(bits):
    """Of any 16 bits, numbers whose products and sums float32 holds."""
    return np.where((bits >> 7 & 255) > 200, bits & 0xBFFF, bits).view(jnp.bfloat16)


def unusual(shape):
    """Normal weights, some of which are any numbers."""
    return below_overflow(sprinkled(shape, 100).view(np.uint16))


def rows_of_x(rows, k):
    """Normal ones; of several, the first is 0 but for a 1, so that it picks the weights there."""
    x = RNG.standard_normal((rows, k)).astype(jnp.bfloat16)
    if rows > 1:
        x[0] = 0
        x[0, -1] = 1
    return x


def check(found, x, matrix):
    """Whether these are the products, up to what 32-bit sums may lose; what x picks is exact."""
    x, matrix = x.astype(np.float64), matrix.astype(np.float64)
    sums, mass = x @ matrix, np.abs(x) @ np.abs(matrix)
    assert (np.abs(found.view(np.float32) - sums) <= 1e-5 * mass).all()
    if len(x) > 1:
        picked = matrix[-1].astype(np.float32) + np.float32(0)  # no sum is -0
        np.testing.assert_array_equal(found[0], picked.view(np.uint32))


@pytest.mark.parametrize(
    ("shape", "rows", "options"),
    [
        ((272, 128), 1, {}),
        ((272, 128), 32, {"steps": 4, "code_bits": 9}),
        ((250, 320), 12, {"steps": 2, "code_bits": 11}),
        ((504, 128), 8, {"along_columns": True}),
        ((192, 336), 5, {"along_columns": True, "steps": 2, "code_bits": 10}),
        ((2, 144, 64), 9, {"batch_axes": 1, "steps": 4}),
    ],
)
def test_product(multiply, shape, rows, options):
    weights = unusual(shape)
    matrix = weights.T if "along_columns" in options else weights
    if "batch_axes" in options:
        matrix = np.concatenate(list(weights), axis=1)
    x = rows_of_x(rows, matrix.shape[0])
    (found,) = multiply(x, [compressed(weights, **options)])
    check(found, x, matrix)


def test_raw_chunks(multiply):
    weights = below_overflow(RNG.integers(0, 2**16, (144, 128)).astype(np.uint16))
    x = rows_of_x(2, 144)
    (found,) = multiply(x, [compressed(weights)])
    check(found, x, weights)


SHARES = [
    Shares(blocks=1, warps=5),
    Shares(blocks=3, warps=8, shared_kib=99),
    Shares(blocks=4, warps=6, shared_kib=160),
]


@bulk_only
def test_bits_depend_on_nothing_else(multiply):
    weights = unusual((320, 128))
    a, x = compressed(weights, steps=2), rows_of_x(12, 320)
    (expected,) = multiply(x, [a])
    check(expected, x, weights)
    for rows, shares in zip((1, 8, 12), SHARES, strict=True):
        (found,) = multiply(x[:rows], [a], shares=shares)
        np.testing.assert_array_equal(found, expected[:rows])
    (rounded,) = multiply(x, [a], float_out=False)
    np.testing.assert_array_equal(
        rounded, expected.view(np.float32).astype(jnp.bfloat16).view(np.uint16)
    )


@bulk_only
@pytest.mark.parametrize("items", [(1, 1), (1, 4), (2, 3), (7, 2), (10, 1)], ids=str)
def test_items_and_groups(multiply, items):
    weights = unusual((320, 128))
    x = rows_of_x(3, 320)
    shares = Shares(blocks=2, warps=max(2, items[1]), items=items)
    (found,) = multiply(x, [compressed(weights, steps=2)], shares=shares)
    check(found, x, weights)


@bulk_only
def test_several_matrices(multiply):
    stacks = [unusual((3, 160, n)) for n in (64, 128, 504)]
    cuts = [{"code_bits": 9}, {"steps": 2}, {"steps": 4, "code_bits": 11}]
    arrays = [compressed(w, stack_axes=1, **cut) for w, cut in zip(stacks, cuts, strict=True)]
    x = rows_of_x(4, 160)
    shares = Shares(blocks=5)
    for index, expected in ((9, 2), (-7, 0)):
        for stack, found in zip(
            stacks, multiply(x, arrays, index=index, shares=shares), strict=True
        ):
            check(found, x, stack[expected])
    for found in multiply(x, arrays, index=-1, shares=shares):
        assert (found == UNWRITTEN).all()


def test_corrupt(multiply):
    """Nothing is accessed that is not there, and what is wrong stays in its columns."""
    good = compressed(unusual((160, 192)), steps=4)
    x = rows_of_x(2, 160)
    (expected,) = multiply(x, [good])
    unchanged = 0
    tries = 10
    for i in range(tries):
        (found,) = multiply(x, [damaged(good, i)])
        same = (found == expected).all(axis=0).reshape(-1, 64).all(axis=1)
        is_nan = np.isnan(found.view(np.float32)).all()
        if i % 5 == 0:
            assert is_nan
        if i % 5 > 1:  # offsets, streams, signs and mantissas: of a chunk, or of two
            assert same.sum() >= 1
        unchanged += same.sum()
    assert unchanged < tries * 3


# What orders accesses. Where lanes copy, that alone which is different there.
ORDERS = {
    "90": r"bar\.(warp\.)?sync|mbarrier\.(try_wait|arrive\.shared)",
    "80": r"cp\.async\.wait_all|mbarrier\.test_wait",
}


def test_every_barrier_is_needed(ptx, plan):
    """Or else the simulated device would not find races either."""
    noise = below_overflow(RNG.integers(0, 2**16, (320, 128)).astype(np.uint16))
    cases = [
        (unusual((192, 64)), 4, Shares(warps=6, items=(1, 3))),
        (noise, 2, Shares(blocks=3, warps=2, items=(2, 2))),  # blocks with columns in common
        (unusual((1056, 128)), 2, Shares(blocks=1, warps=1, items=(33, 1))),  # long lists of chunks
    ]
    cases = [
        (rows_of_x(3, len(weights)), weights, compressed(weights, steps=steps), shares)
        for weights, steps, shares in cases
    ]

    def is_noticed(changed):
        for x, weights, a, shares in cases:
            try:
                (found,) = run_product(changed, plan, x, [a], shares=shares)
                check(found, x, weights)
            except (KernelError, AssertionError):
                return True
        return False

    orders = ORDERS[architecture(ptx)]
    found = unnoticed(ptx, "product_kernelILi1E", orders, is_noticed)
    # Two are for the compiler's sake. Of the list of chunks, one comes before there is anything in
    # it, and one before another.
    assert len(found) == {"90": 4, "80": 0}[architecture(ptx)], found
