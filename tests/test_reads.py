"""Reads of a parameter in one trace are one array while it lives, as those of a plain one are."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, struct
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
import df11_jax.nnx
from df11_jax import _reads
from df11_jax.nnx import CompressedParam, compress

WEIGHTS = [random_weights((128, 128), seed) for seed in range(2)]


@pytest.fixture
def model():
    model = nnx.Dict(up=nnx.Param(WEIGHTS[0]), gate=nnx.Param(WEIGHTS[1]))
    compress(model)
    return model


def test_one_array_a_trace(model):
    inner = []

    @nnx.jit
    def run(model):
        up, gate = model.up[...], model.gate[...]
        assert up is model.up[...] is model.up.get_value() is not gate
        assert gate is nnx.clone(model).gate[...]

        def body(carry, _):
            read = model.up[...]
            assert read is model.up[...] is not up
            inner.append(read)
            return carry + read, None

        total, _ = jax.lax.scan(body, jnp.zeros_like(up), length=2)
        checkpointed = jax.checkpoint(lambda x: x + model.gate[...])(total)
        assert up is model.up[...]
        return checkpointed, up

    total, up = run(model)
    assert_same_bits(up, WEIGHTS[0])
    assert_same_bits(total, (WEIGHTS[0] + WEIGHTS[0]) + WEIGHTS[1])
    assert inner


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes of the CPU handler")
def test_one_array_outside_of_traces(model):
    assert count_decodes(lambda param: [param[...] for _ in range(3)], model.up) == 1
    kept = model.up[...]
    assert model.up[...] is kept
    kept.delete()
    again = model.up[...]  # what is deleted is read anew
    assert_same_bits(again, WEIGHTS[0])
    model.up.set_value(df11_jax.compress(WEIGHTS[1]))
    assert_same_bits(model.up[...], WEIGHTS[1])


def test_keeps_nothing_alive(model):
    read = model.up[...]
    raw = model.up.get_raw_value()
    dead = [weakref.ref(read), weakref.ref(raw.exponents)]
    del read, raw
    gc.collect()
    assert dead[0]() is None and dead[1]() is not None
    read = model.up[...]
    del model.up
    gc.collect()
    assert dead[1]() is None
    assert_same_bits(read, WEIGHTS[0])


def test_linen_finds_a_parameter_by_what_it_reads():
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            names = ("up", "gate")
            reads = [self.param(name, nn.initializers.zeros, (128, 128)) for name in names]
            for name, read in zip(names, reads, strict=True):
                found = nn.unbox(self.variables["params"])
                assert [key for key in found if found[key] is read] == [name]
            return x @ reads[0] @ reads[1]

    params = dict(zip(("up", "gate"), WEIGHTS, strict=True))
    small = {"params": df11_jax.compress_params(params)}
    x = random_weights((2, 128), 3, 1.0)
    run = jax.jit(Dense().apply)
    assert_same_bits(run(small, x), run({"params": params}, x))


@struct.dataclass
class Quantized:
    values: nnx.Param
    scale: nnx.Param


def test_parameters_of_no_module_stay_plain():
    class Holder(nnx.Module):
        def __init__(self):
            self.kernel = nnx.data(Quantized(*map(nnx.Param, WEIGHTS)))
            self.listed = nnx.data([{"w": nnx.Param(WEIGHTS[0])}])
            self.inner = nnx.data({"w": nnx.Dict(w=nnx.Param(WEIGHTS[1]))})

    model = Holder()
    compress(model)
    found = {path for path, _ in nnx.to_flat_state(nnx.state(model, CompressedParam))}
    assert found == {("listed", 0, "w"), ("inner", "w", "w")}
    single = nnx.Param(WEIGHTS[0])
    for container in ([single], {"w": single}, single):
        compress(container)
        assert isinstance(single, CompressedParam)


def test_a_model_that_moves_axes_of_arrays_is_told_of():
    stack = nnx.Param(df11_jax.compress(jnp.stack(WEIGHTS), stack_axes=1))
    compress(stack)
    moved = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), stack)
    with pytest.raises(ValueError, match="header is uint32") as error:
        moved.get_value()
    assert "param_scan_axis=0" in error.value.__notes__[0]


def test_nothing_is_kept_of_what_was_read():
    model = nnx.Linear(128, 128, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    compress(model)
    weights = model.kernel[...]
    found = _reads.source_of(weights)
    assert found.exponents is model.kernel.get_raw_value().exponents
    assert _reads.source_of(jnp.copy(weights)) is None
    assert _reads.source_of(np.asarray(weights)) is None
    del found
    df11_jax.nnx.decompress(model)
    gc.collect()
    assert _reads.source_of(weights) is None  # the compressed arrays are gone
    del weights
    gc.collect()
    assert not _reads._sources
