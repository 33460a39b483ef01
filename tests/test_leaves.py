"""What users pass that is no array, or another library's; and patterns that are found nowhere."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax import nnx
from payloads import assert_same_bits, random_weights

import df11_jax
import df11_jax.nnx
from df11_jax import DF11Array, compress, compress_params, size_report


class Variable:
    """An array by JAX's protocol, as variables of Keras are; its dtype is a text, as theirs is."""

    def __init__(self, value):
        self.value = value
        self.dtype = str(value.dtype)
        self.shape = value.shape

    def __jax_array__(self):
        return self.value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


def keras_variable(value):
    keras = pytest.importorskip("keras", reason="needs Keras")
    if keras.backend.backend() != "jax":
        pytest.skip("needs KERAS_BACKEND=jax")
    return keras.Variable(value, dtype=str(value.dtype))


variables = pytest.mark.parametrize("variable", [Variable, keras_variable])


@variables
def test_variables(variable):
    weights, wide = random_weights((300, 128)), jnp.ones((300, 128), jnp.float32)
    large, other, small = map(variable, (weights, wide, jnp.ones(3, jnp.bfloat16)))
    assert_same_bits(df11_jax.decompress(compress(large)), weights)
    for tree in ([large, other, small], {"a": [large], "b": (other, small)}):
        result = jax.tree.leaves(compress_params(tree), is_leaf=lambda x: isinstance(x, DF11Array))
        assert_same_bits(df11_jax.decompress(result[0]), weights)
        assert result[1] is other and result[2] is small
        report = size_report(tree)
        assert report.nbytes == weights.nbytes + wide.nbytes + 6
        assert [leaf.dtype for leaf in report.leaves] == ["bfloat16", "float32", "bfloat16"]
    assert_same_bits(df11_jax.decompress(compress_params(large)), weights)
    with pytest.warns(UserWarning, match=r"compressed nothing.*1 leaf .* is float32"):
        compress_params([other])
    tied = compress_params([large, large])
    assert tied[0] is tied[1]
    moved = compress_params(
        {"w": variable(random_weights((64, 2, 128)))}, stacked="w", stack_axis=1
    )
    assert moved["w"].stack_shape == (2,)


def test_a_keras_model():
    keras = pytest.importorskip("keras", reason="needs Keras")
    if keras.backend.backend() != "jax":
        pytest.skip("needs KERAS_BACKEND=jax")
    layers = [keras.layers.Input((128,)), keras.layers.Dense(256, dtype="bfloat16")]
    model = keras.Sequential(layers)
    with pytest.raises(TypeError, match=r"got Sequential\. Of a Keras model pass the variables"):
        compress_params(model)
    small = compress_params(model.trainable_variables)
    x = jnp.ones((2, 128), jnp.bfloat16)

    @jax.jit
    def run(trainable):
        weights = df11_jax.decompress_params(trainable)
        return model.stateless_call(weights, model.non_trainable_variables, x)[0]

    assert isinstance(small[0], DF11Array)
    assert_same_bits(run([small[0], small[1].value]), model(x))


class FromAnotherPackage:
    pass


class Module(FromAnotherPackage):
    pass


@pytest.mark.parametrize("function", [compress_params, size_report])
def test_no_pytree(function, monkeypatch):
    message = rf"^{function.__name__}: expected a pytree of arrays, such as a dict of them, got "
    for found, rest in (
        (pathlib.Path("model"), r"PosixPath\('model'\)\. df11_jax\.checkpoints\.load\(path\)"),
        ("model", r"'model'\. df11_jax\.checkpoints\.load"),
        (nn.Dense(3), r"Dense\. A linen module has no parameters"),
        (len, "builtin_function_or_method. Pass the parameters themselves"),
        (object(), "object. Pass"),
    ):
        with pytest.raises(TypeError, match=message + rest):
            function(found)
    # A user's class, of a class of torch.
    monkeypatch.setattr(FromAnotherPackage, "__module__", "torch.nn.modules")
    with pytest.raises(TypeError, match=message + r"Module\. Of torch pass .*from_dlpack.*state_d"):
        function(Module())


def test_what_holds_no_leaves():
    assert compress_params(None) is None
    assert compress_params({}) == {}
    assert size_report(None).leaves == ()
    weights = random_weights((300, 64))
    for array in (weights, np.asarray(weights)):
        assert isinstance(compress_params(array), DF11Array)
    small = compress(weights)
    assert compress_params(small) is small


def test_leaves_that_are_no_arrays():
    others = {"name": "bert", "act": jax.nn.gelu, "none": None, "object": object(), "raw": b"a"}
    tree = others | {"w": random_weights((300, 64)), "step": 3, "rate": np.float32(0.1)}
    small = compress_params(tree, stacked="^act|^name|^step")
    assert all(small[name] is others[name] for name in others)
    for report in (size_report(tree), size_report(small)):
        assert [leaf.path for leaf in report.leaves] == ["rate", "step", "w"]
        assert "bert" not in str(report)
    assert size_report(small).nbytes == small["w"].compressed_nbytes + 12
    back = df11_jax.decompress_params(small)
    assert back["act"] is jax.nn.gelu
    assert_same_bits(back["w"], tree["w"])


def test_arrays_of_other_libraries():
    def foreign(*shape):
        return tensorstore.array(np.ones(shape, np.float32))

    tree = {"a": foreign(300, 64), "b": [foreign(300, 65)], "small": foreign(3), "c": np.ones(2)}
    with pytest.warns(UserWarning, match=r"compress_params: arrays that are neither") as found:
        small = compress_params(tree)
    assert len(found) == 1 and found[0].filename == __file__
    message = str(found[0].message)
    assert (
        "stay as they are: a (tensorstore.TensorStore), b/0 (tensorstore.TensorStore)." in message
    )
    assert "from_dlpack(tensor.detach())" in message and "small" not in message
    assert small["a"] is tree["a"]
    compress_params(tree, include="^c")  # warnings are errors here
    with pytest.raises(TypeError, match="got TensorStore"):
        compress_params(tree["a"])


@pytest.mark.parametrize("argument", ["include", "stacked"])
def test_patterns_that_are_found_nowhere(argument):
    tree = {"layers": {"up": random_weights((2, 128, 128))}}
    tree |= {f"n{i}": np.ones(3) for i in range(10)}
    model = nnx.Dict(layers=nnx.Dict(up=nnx.Param(tree["layers"]["up"])))
    for compress_one, paths in (
        (functools.partial(compress_params, tree), r"layers/up, n0, .* and 3 more"),
        (functools.partial(df11_jax.nnx.compress, model), "layers/up$"),
    ):
        with pytest.warns(
            UserWarning, match=rf"compress.*: {argument}='\^blocks/' is found in no .* are {paths}"
        ) as found:
            compress_one(**{argument: "^blocks/"})
        assert len(found) == 1 and found[0].filename == __file__
        compress_one(**{argument: "^layers/"})
    for empty in ({}, None, {"a": None}):
        compress_params(empty, **{argument: "^blocks/"})
