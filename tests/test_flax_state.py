"""`flax.serialization` of compressed trees."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from payloads import assert_same_bits, random_weights

from df11_jax import compress, decompress_params

serialization = pytest.importorskip("flax.serialization", reason="needs flax")

WEIGHTS = random_weights((2, 64, 64))


@pytest.fixture(scope="module")
def tree():
    return {
        "stack": compress(WEIGHTS, stack_axes=1),
        "list": [compress(WEIGHTS[0]), jnp.arange(3)],
    }


def saved_by(a):
    return serialization.to_bytes({"block": {"kernel": a}})


def test_there_and_back(tree):
    target = jax.tree.map(jnp.zeros_like, tree)
    restored = serialization.from_bytes(target, serialization.to_bytes(tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    plain = decompress_params(restored)
    assert_same_bits(plain["stack"], WEIGHTS)
    assert_same_bits(plain["list"][0], WEIGHTS[0])
    assert_same_bits(jax.jit(lambda a: a[1] + 0)(restored["stack"]), WEIGHTS[1] + 0)


def test_a_target_of_shapes(tree):
    shapes = jax.eval_shape(lambda: tree)
    restored = serialization.from_state_dict(shapes, serialization.to_state_dict(tree))
    assert_same_bits(decompress_params(restored)["stack"], WEIGHTS)


@pytest.mark.parametrize(
    "saved", [WEIGHTS, compress(WEIGHTS[:1], stack_axes=1), compress(WEIGHTS), {"header": 1}]
)
def test_another_tensor_than_the_target(saved, tree):
    with pytest.raises(ValueError, match=r"block/kernel: .*(expected|is uint32)"):
        serialization.from_bytes({"block": {"kernel": tree["stack"]}}, saved_by(saved))


def test_another_layout_of_the_same_shape():
    target = compress(WEIGHTS[0])
    other = compress(WEIGHTS[0], along_columns=True)
    with pytest.raises(
        ValueError, match=r"block/kernel: expected a tensor like .*=False.*got .*=True"
    ):
        serialization.from_bytes({"block": {"kernel": target}}, saved_by(other))


@pytest.mark.parametrize(
    "imports",
    [
        "import flax.serialization; import df11_jax",
        "import df11_jax; import flax.serialization",
        "import df11_jax; import flax",
        "import df11_jax; from flax import linen",
        # Asking for it is not importing it.
        "import df11_jax, importlib.util; importlib.util.find_spec('flax.serialization'); "
        "import flax.serialization",
    ],
)
def test_no_import_is_needed(imports):
    program = f"""
import sys
import ml_dtypes, numpy as np
{imports}
import flax.serialization
small = {{"a": df11_jax.compress(np.ones((64, 64), ml_dtypes.bfloat16))}}
again = flax.serialization.from_bytes(small, flax.serialization.to_bytes(small))
assert (np.asarray(df11_jax.decompress(again["a"])) == 1).all()
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=600)


def test_finders_of_an_old_kind():
    code = """
import sys

class Finder:
    def find_module(self, name, path=None):
        return None

sys.meta_path.insert(0, Finder())
import df11_jax
import flax.serialization
"""
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code], check=True)


def test_arrays_that_were_made_before_flax_was_imported():
    program = """
import sys
import ml_dtypes, numpy as np
import df11_jax
small = {"a": df11_jax.compress(np.ones((64, 64), ml_dtypes.bfloat16))}
assert not any(name.partition(".")[0] == "flax" for name in sys.modules)
from flax import serialization
assert serialization.from_bytes(small, serialization.to_bytes(small))["a"].shape == (64, 64)
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=600)
