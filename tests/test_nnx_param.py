"""`CompressedParam`, and which parameters become one."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax.linen
from df11_jax.nnx import CompressedParam, compress
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, DF11Save

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


def test_a_model_of_another_type():
    with pytest.warns(UserWarning, match=r"nnx.compress .* 1 leaf \(128 KiB\) is float32") as found:
        compress(nnx.Linear(128, 256, rngs=nnx.Rngs(0)))
    assert found[0].filename == __file__
    mixed = nnx.List([linear(), nnx.Linear(128, 256, rngs=nnx.Rngs(0))])
    compress(mixed)
    compress(mixed)
    compress(nnx.Linear(128, 256, rngs=nnx.Rngs(0)), include="bias")
    compress(nnx.eval_shape(lambda: nnx.Linear(128, 256, rngs=nnx.Rngs(0))))


def test_adapters_stay_plain_and_are_trained(x):
    adapter = nnx.LoRA(
        128, 256, 256, base_module=linear(), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16
    )
    assert adapter.lora_a.size > 16384
    compress(adapter)
    assert isinstance(adapter.base_module.kernel, CompressedParam)
    assert type(adapter.lora_a) is type(adapter.lora_b) is nnx.LoRAParam
    optimizer = nnx.Optimizer(adapter, optax.adam(1e-3), wrt=nnx.LoRAParam)

    def loss(model):
        return jnp.square(model(x)).sum().astype(jnp.float32)

    before = loss(adapter)
    optimizer.update(adapter, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapter))
    assert loss(adapter) < before


# Parameters that are given compressed weights.


def linear(seed=0):
    return nnx.Linear(128, 256, rngs=nnx.Rngs(seed), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


@pytest.fixture
def x():
    return random_weights((2, 128), 3, 1.0)


def test_a_state_of_compressed_weights(x):
    model = linear(1)
    nnx.update(model, df11_jax.compress_params(nnx.state(linear())))
    for _ in range(2):
        compress(model)
        assert type(model.kernel) is CompressedParam and type(model.bias) is nnx.Param
        assert_same_bits(model(x), linear()(x))


def test_a_checkpoint_into_an_abstract_model(x, tmp_path):
    model = linear()
    compress(model)
    weights = nnx.to_pure_dict(nnx.state(model), extract_fn=lambda param: param.get_raw_value())
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "weights", args=DF11Save(weights))
        weights = checkpointer.restore(tmp_path / "weights", args=DF11Restore())

    model = nnx.eval_shape(linear)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(model, state)
    compress(model)
    assert isinstance(model.kernel, CompressedParam)
    assert_same_bits(model(x), linear()(x))


@pytest.mark.skipif(
    flax.__version__ == "0.12.5",
    reason="needs flax 0.12.6, whose get_abstract_model takes parameters that are trees",
)
def test_an_abstract_parameter(param):
    abstract = jax.eval_shape(lambda: param)
    assert abstract.get_value() == jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    _, state = nnx.get_abstract_model(lambda: nnx.Dict(w=param), mesh)
    assert state["w"].shape == (256, 128)


def test_a_linen_module_in_an_nnx_model(x):
    dense = nn.Dense(256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)), x)
    run = nnx.jit(lambda model, x: model(x))
    expected = run(model, x)
    nnx.update(model, df11_jax.compress_params(nnx.state(model)))
    assert df11_jax.size_report(nnx.state(model)).nbytes < 0.7 * 2 * 128 * 256
    assert_same_bits(run(model, x), expected)


def test_a_linen_module_in_an_nnx_model_is_not_compressed_in_place(x):
    dense = nn.Dense(256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    inner = nnx.bridge.lazy_init(nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)), x)
    plain = nnx.Linear(128, 256, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = nnx.Dict(inner=inner, plain=plain)
    with pytest.raises(TypeError, match=r"^inner/.*kernel: .* linen module.*nnx\.update"):
        compress(model)
    assert type(plain.kernel) is nnx.Param
    # What was compressed as a pytree is left as it is.
    nnx.update(inner, df11_jax.compress_params(nnx.state(inner)))
    run = nnx.jit(lambda model, x: model(x))
    expected = run(inner, x)
    compress(model)
    assert type(plain.kernel) is CompressedParam
    assert_same_bits(run(inner, x), expected)


def test_modules_read_compressed_arrays_in_plain_parameters():
    x = random_weights((2, 128), seed=1, scale=1.0)
    model = nnx.Linear(128, 256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    small = df11_jax.compress_params(model)
    assert df11_jax.size_report(small).nbytes < 0.7 * 2 * 128 * 256
    run = nnx.jit(lambda model, x: model(x))
    assert_same_bits(run(small, x), run(model, x))


def test_dot_and_decompress_take_parameters(param):
    x = random_weights((3, 256), seed=1, scale=1.0)
    assert_same_bits(df11_jax.decompress(param), random_weights((256, 128)))
    assert_same_bits(df11_jax.dot(x, param), df11_jax.dot(x, param.get_raw_value()))
    assert_same_bits(df11_jax.dot(x, [nnx.Param(param[...])])[0], x @ param[...])


def test_an_nnx_module_in_a_linen_model(x):
    model = nnx.bridge.to_linen(nnx.Linear, 128, 256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), x)
    small = df11_jax.compress_params(variables)
    assert df11_jax.size_report(small).nbytes < 0.7 * 2 * 128 * 256
    assert_same_bits(jax.jit(model.apply)(small, x), jax.jit(model.apply)(variables, x))


# Errors.


def test_traced_models():
    with pytest.raises(TypeError, match=r"up/kernel: compression runs on the host"):
        nnx.jit(compress)(
            nnx.Dict(up=nnx.Linear(256, 128, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
        )
