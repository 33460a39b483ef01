"""Exported programs in processes that have imported the package, and compress and trace nothing."""

import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from payloads import assert_same_bits, random_weights

import df11_jax
from df11_jax import published

WEIGHTS = random_weights((2, 64, 128))
X = random_weights((3, 64), seed=1, scale=1.0)

CALL = """
import importlib, pathlib, sys

importlib.import_module(sys.argv[1])

import jax, numpy as np
from jax import export

for path in pathlib.Path(sys.argv[2]).glob("*.program"):
    exported = export.deserialize(bytearray(path.read_bytes()))
    with np.load(path.with_suffix(".arguments.npz")) as file:
        arguments, _ = jax.tree.unflatten(exported.in_tree, list(file.values()))
    (result,) = jax.tree.leaves(exported.call(*arguments))
    np.save(path.with_suffix(".npy"), np.asarray(result).view(np.uint16))
"""

IMPORT = """
import sys
import df11_jax
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized()
assert not {"click", "flax", "orbax"} & sys.modules.keys()
print(df11_jax.__file__)
"""


@pytest.fixture(scope="module")
def calls():
    """By name, a function, its compressed argument, and the module that has the latter's class."""
    stack = df11_jax.compress(WEIGHTS, stack_axes=1)
    matrix = df11_jax.compress(WEIGHTS[1])
    unit = published.encode_unit({"w": np.asarray(WEIGHTS[1])})
    return {
        "native": (df11_jax.decompress, matrix, "df11_jax"),
        "slice": (df11_jax.decompress, df11_jax.DF11Slice(stack, jnp.int32(1)), "df11_jax"),
        "product": (lambda a: df11_jax.dot(X, a), matrix, "df11_jax"),
        "published": (published.decompress, unit, "df11_jax.published"),
    }


def call_elsewhere(folder, module, programs):
    """The results of programs in another process, which only imports a module of df11_jax.

    Args:
        folder: an empty folder.
        module: the name of the module.
        programs: functions and tuples of arguments, by name.
    """
    for name, (function, arguments) in programs.items():
        exported = export.export(jax.jit(function), disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS)(
            *arguments
        )
        (folder / f"{name}.program").write_bytes(exported.serialize())
        np.savez(folder / f"{name}.arguments.npz", *jax.tree.leaves(arguments))
    subprocess.run([sys.executable, "-P", "-c", CALL, module, folder], check=True)
    return {name: np.load(folder / f"{name}.npy").view(jnp.bfloat16) for name in programs}


def assert_same_results(results, calls):
    for name, result in results.items():
        function, argument, _ = calls[name]
        (expected,) = jax.tree.leaves(function(argument))
        assert_same_bits(result, expected)
        if name != "product":
            assert_same_bits(result, WEIGHTS[1])


def test_weights_as_constants(calls, tmp_path):
    def close_over(function, argument):
        return lambda: function(argument)

    programs = {
        name: (close_over(function, argument), ())
        for name, (function, argument, _) in calls.items()
    }
    assert_same_results(call_elsewhere(tmp_path, "df11_jax", programs), calls)


@pytest.mark.parametrize("module", ["df11_jax", "df11_jax.published"])
def test_weights_as_arguments(calls, tmp_path, module):
    programs = {
        name: (function, (argument,))
        for name, (function, argument, needed) in calls.items()
        if needed == module
    }
    assert_same_results(call_elsewhere(tmp_path, module, programs), calls)


@pytest.mark.parametrize("libraries", ["installed", "missing", "damaged"])
def test_importing(libraries, tmp_path):
    """It starts no backend, prints nothing, and needs neither libraries nor extras."""
    package = pathlib.Path(df11_jax.__file__).parent
    if libraries != "installed":
        names = [path.name for path in package.glob("_*_library.*so")]
        if not names:
            pytest.skip("df11_jax is installed to be edited, and its libraries lie elsewhere")
        uncompiled = shutil.ignore_patterns("_*_library.*so", "__pycache__")
        package = shutil.copytree(package, tmp_path / "df11_jax", ignore=uncompiled)
        if libraries == "damaged":
            for name in names:
                (package / name).write_bytes(b"no library")
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=package.parent, capture_output=True, text=True
    )
    expected = f"{package / '__init__.py'}\n"
    assert (run.returncode, run.stdout, run.stderr) == (0, expected, "")


def test_for_any_number_of_layers():
    stack = df11_jax.compress(WEIGHTS, stack_axes=1)
    (layers,) = export.symbolic_shape("layers")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((layers, *a.shape[1:]), a.dtype), stack)
    exported = export.export(
        jax.jit(df11_jax.decompress), disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS
    )(shapes)
    assert_same_bits(exported.call(stack), WEIGHTS)


def test_for_any_number_of_slices():
    def chosen(stack, index):
        return df11_jax.decompress(df11_jax.DF11Slice(stack, index))

    stack, index = df11_jax.compress(WEIGHTS, stack_axes=1), jnp.array([1, 0, 1])
    (count,) = export.symbolic_shape("count")
    exported = export.export(
        jax.jit(chosen),
        platforms=("cpu", "tpu"),
        disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS,
    )(jax.eval_shape(lambda: stack), jax.ShapeDtypeStruct((count,), index.dtype))
    assert_same_bits(exported.call(stack, index), WEIGHTS[index])
