"""Linen models with partitioned parameters, and on several devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from linen_models import WIDTH, bf16, init, make
from payloads import assert_same_bits, random_weights

from df11_jax import DF11Array, compress_params
from df11_jax.linen import compressed, scan


def test_partitioned_parameters():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    dense = functools.partial(nn.Dense, WIDTH, kernel_init=kernel_init, use_bias=False, **bf16)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return dense(name="dense")(x), None

    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    options["metadata_params"] = {nn.PARTITION_NAME: "layers"}
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    plain_model = nn.scan(Layer, **options)()
    plain = init(plain_model, x, None)
    assert plain["params"]["dense"]["kernel"].names == ("layers", "in", "out")
    variables = compress_params(plain, stacked=".")
    assert isinstance(variables["params"]["dense"]["kernel"], DF11Array)
    expected = jax.jit(plain_model.apply)(plain, x, None)[0]
    for layers in (scan(Layer, **options), nn.scan(compressed(Layer), **options)):
        assert_same_bits(jax.jit(layers().apply)(variables, x, None)[0], expected)


def test_compressed_leaves_are_in_no_box():
    def boxed(names, *shape):
        return nn.LogicallyPartitioned(random_weights(shape), names=names)

    params = {
        "layers": {
            "kernel": boxed(("in", "layers", "out"), 128, 3, 64),
            "scale": boxed(("in", "layers"), 128, 3),
        },
        "norm": boxed(("in",), 128),
        "twice": nn.Partitioned(boxed(("in", "out"), 128, 128), names=("in", "out")),
    }
    options = {"stacked": "^layers/", "stack_axis": 1}
    small = compress_params(params, **options)
    # So is what compression moves, for its box names axes in the order that they had.
    assert isinstance(small["layers"]["kernel"], DF11Array)
    assert isinstance(small["twice"], DF11Array)
    assert small["layers"]["scale"].shape == (3, 128)
    assert small["norm"].names == ("in",) and small["norm"].value is params["norm"].value
    kept = compress_params(params, include="norm")
    assert jax.tree.structure(kept) == jax.tree.structure(params)
    unboxed = nn.unbox(params)
    front = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), params["layers"])
    again = compress_params(params | {"layers": front}, like=small)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    assert_same_bits(again["twice"].unbox(), unboxed["twice"])


def test_partitioned_parameters_on_a_mesh():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("out",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "out"))
    options = bf16 | {"use_bias": False, "kernel_init": kernel_init}
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    with jax.set_mesh(mesh):
        plain = nn.Dense(WIDTH, **options).init(jax.random.key(0), x)
        expected = jax.jit(nn.Dense(WIDTH, **options).apply)(plain, x)
        for dense, variables in (
            (nn.Dense, compress_params(plain)),
            (compressed(nn.Dense), compress_params(plain)),
        ):
            assert_same_bits(jax.jit(dense(WIDTH, **options).apply)(variables, x), expected)


def test_sharded_batches():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    model, plain_model, plain, variables = make("scan")
    tokens = jax.device_put(jnp.arange(12).reshape(4, 3), jax.NamedSharding(mesh, jax.P("batch")))
    everywhere = jax.NamedSharding(mesh, jax.P())
    plain, variables = jax.device_put((plain, variables), everywhere)
    logits = jax.jit(model.apply)(variables, tokens)
    assert_same_bits(logits, jax.jit(plain_model.apply)(plain, tokens))
    assert logits.sharding.spec[0] == "batch"
