"""`CompressedParam`, and which parameters become one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
from df11_jax.nnx import CompressedParam, compress

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes of the CPU handler"
)

# A parameter.


@pytest.fixture
def param():
    class Holder(nnx.Module):
        def __init__(self):
            self.first = nnx.Param(random_weights((256, 128)), note="kept")
            self.again = self.first

    holder = Holder()
    compress(holder)
    assert holder.again is holder.first
    return holder.first


def test_reads_like_an_array(param):
    weights = random_weights((256, 128))
    assert isinstance(param, CompressedParam) and param.note == "kept"
    assert_same_bits(param[...], weights)
    assert_same_bits(param.get_value(), weights)
    assert_same_bits(param[3:5, 2], weights[3:5, 2])
    assert_same_bits(param.T, weights.T)
    assert_same_bits(param.astype(jnp.bfloat16), weights)
    assert_same_bits(param + param, weights + weights)
    assert_same_bits(
        jnp.ones((1, 256), jnp.bfloat16) @ param, jnp.ones((1, 256), jnp.bfloat16) @ weights
    )
    assert_same_bits(jnp.asarray(param), weights)
    assert len(param) == 256
    with pytest.raises(AttributeError, match="no_such"):
        _ = param.no_such


@on_cpu
def test_looks_without_decoding(param):
    def look(param):
        assert (param.shape, param.ndim, param.size) == ((256, 128), 2, 256 * 128)
        assert param.dtype == jnp.bfloat16
        assert "CompressedParam" in repr(param)
        assert "DF11Array(bfloat16[256,128], 10." in repr(param)
        nnx.display(param)
        return 0

    assert count_decodes(look, param) == 0


def test_can_be_replaced_as_a_whole(param):
    with pytest.raises(TypeError, match=r"DF11Array.*cannot be changed in place"):
        param[3] = 0
    other = random_weights((256, 128), 1)
    param[...] = other
    assert_same_bits(param[...], other)
    param[3] = 0
    assert not param[3].any()
    param.set_value(df11_jax.compress(other))
    assert_same_bits(param[...], other)


# Which parameters are compressed.


class Special(nnx.Param):
    def get_value(self, **index):
        return -super().get_value(**index)


def test_which_parameters():
    class Mixed(nnx.Module):
        def __init__(self):
            self.special = Special(random_weights((256, 128)))
            self.float32 = nnx.Param(jnp.ones((256, 128)))
            self.small = nnx.Param(random_weights((4, 4)))
            self.statistic = nnx.BatchStat(random_weights((256, 128)))
            self.left_out = nnx.Param(random_weights((256, 128)))
            self.inner = nnx.Dict(weights=nnx.Param(random_weights((256, 128))))

    model = Mixed()
    special = model.special[...]
    compress(model, include="^(?!left_out)")
    found = nnx.to_flat_state(nnx.state(model, CompressedParam))
    assert {path for path, _ in found} == {("special",), ("inner", "weights")}
    assert isinstance(model.special, Special)
    assert_same_bits(model.special[...], special)
    again = model.special.get_raw_value()
    compress(model)
    assert model.special.get_raw_value() is again
    assert isinstance(model.left_out, CompressedParam)


def test_traced_models():
    with pytest.raises(TypeError, match=r"up/kernel: compression runs on the host"):
        nnx.jit(compress)(
            nnx.Dict(up=nnx.Linear(256, 128, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
        )
