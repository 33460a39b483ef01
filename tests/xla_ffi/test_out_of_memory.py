"""Memory runs out at each allocation of the CPU library in turn: an error, and nothing worse."""

import os
import subprocess
import sys

import pytest
from compiling import ROOT, needs_compiler

SCRIPT = """
import ctypes
import sys

import jax
import numpy as np
from payloads import assert_same_bits, random_weights

import df11_jax
from df11_jax import published

preloaded = ctypes.CDLL(sys.argv[1])
preloaded.stop_failing.restype = ctypes.c_bool

# Enough chunks and blocks for all threads, and a path that takes more room than a short string.
tree = {"a/path/of/some/length": np.array(random_weights((2048, 512))),
        "small": np.array(random_weights((3, 100, 64)))}
small = df11_jax.compress_params(tree, stacked="small", min_size=0)
unit = published.encode_unit(tree)
calls = {
    "decode": lambda jitted=jax.jit(df11_jax.decompress_params): jitted(small),
    "published decode": lambda jitted=jax.jit(published.decompress): jitted(unit),
    "encode": lambda: df11_jax.decompress_params(
        df11_jax.compress_params(tree, stacked="small", min_size=0, threads=4)),
    "published encode": lambda: published.decompress(published.encode_unit(tree, threads=4)),
}
call = calls[sys.argv[2]]
call()
errors = 0
for all_later in (False, True):
    for allocations in range(10_000):
        preloaded.fail_after(ctypes.c_long(allocations), all_later)
        try:
            result = jax.block_until_ready(call())
        except (MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
            failed = preloaded.stop_failing()
            assert failed and ("out of memory" in str(error) or "bad_alloc" in str(error)), error
            errors += 1
            continue
        failed = preloaded.stop_failing()
        for name, weights in tree.items():
            assert_same_bits(result[name], weights)
        if not failed:
            print(all_later, allocations, errors)
            break
    else:
        raise AssertionError("does not end")
assert errors > 0
"""


@pytest.fixture(scope="module")
def failing_new(tmp_path_factory):
    library = tmp_path_factory.mktemp("failing_new") / "libfailing_new.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["tests/xla_ffi/failing_new.cc", "-o", str(library)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.parametrize("call", ["decode", "published decode", "encode", "published encode"])
def test_no_memory_is_an_error(call, failing_new):
    environment = os.environ | {
        "LD_PRELOAD": str(failing_new),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(failing_new), call],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(result.stdout)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr[-3000:]}"
