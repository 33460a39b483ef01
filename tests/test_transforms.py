"""Decompression under every transformation, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from payloads import assert_same_bits, count_decodes, random_weights

from df11_jax import EXPORT_SAFETY_CHECKS, compress, decompress, decompress_params, dot, take
from df11_jax._slices import decode_slices

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes of the CPU handler"
)


@pytest.fixture(scope="module")
def weights():
    return random_weights((4, 64, 128))


@pytest.fixture(scope="module")
def stack(weights):
    return compress(weights, stack_axes=1)


@pytest.fixture(scope="module")
def x():
    return random_weights((3, 64), seed=1, scale=1.0)


def slice_at(index, *stacks, **options):
    return decode_slices(stacks, index, **options)[0]


def test_eager_and_jit(weights, stack):
    assert_same_bits(decompress(stack), weights)
    assert_same_bits(jax.jit(decompress)(stack), weights)


def test_under_a_trace_without_compiled_decoders(weights, stack, monkeypatch):
    # What backends other than CPU and CUDA do.
    monkeypatch.setattr("df11_jax._ffi.platforms", lambda target: ())
    assert_same_bits(jax.jit(lambda a: decompress(a))(stack), weights)
    assert count_decodes(jax.jit(lambda a: decompress(a)), stack) == 0


def test_eager_decoding_goes_by_where_the_arrays_are(weights, stack, monkeypatch, caplog):
    # The platform of the default device may be another. Unlike any before, so that nothing of it
    # is compiled already:
    monkeypatch.setattr("df11_jax._ffi.platforms", lambda target: ("cpu", "another"))
    with jax.log_compiles():
        assert_same_bits(decompress(stack), weights)
    programs = [message for message in caplog.messages if message.startswith("Compiling")]
    assert not any("platform_index" in program for program in programs)
    assert any("_decode_on_any_platform" in program for program in programs)


def test_eager_decoding_stays_on_its_device(weights, stack):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    second = jax.devices()[1]
    out = decompress(jax.device_put(stack, second))
    assert out.devices() == {second}
    assert_same_bits(out, weights)


def test_scan_over_the_stack(weights, stack):
    _, out = jax.lax.scan(lambda carry, a: (carry, decompress(a)), None, stack)
    assert_same_bits(out, weights)


def test_scan_over_the_index(weights, stack):
    _, out = jax.lax.scan(lambda carry, i: (carry, slice_at(i, stack)), None, jnp.arange(4))
    assert_same_bits(out, weights)


def test_while_loop(weights, stack):
    def body(state):
        i, _ = state
        return i + 1, slice_at(i, stack)

    _, out = jax.lax.while_loop(lambda s: s[0] < 3, body, (0, jnp.zeros_like(weights[0])))
    assert_same_bits(out, weights[2])


def test_cond(weights, stack):
    f = jax.jit(lambda p, a: jax.lax.cond(p, lambda: decompress(a[0]), lambda: decompress(a[1])))
    assert_same_bits(f(False, stack), weights[1])


def test_vmap_over_payloads(weights, stack):
    assert_same_bits(jax.vmap(decompress)(stack), weights)
    assert_same_bits(jax.jit(jax.vmap(decompress))(stack), weights)
    out = jax.vmap(decompress, in_axes=1, out_axes=1)(jax.tree.map(lambda a: a[None], stack))
    assert_same_bits(out, weights[None])


def test_vmap_over_indices(weights, stack):
    index = jnp.array([3, 0, -5, 9])
    out = jax.vmap(lambda i: slice_at(i, stack))(index)
    assert_same_bits(out, weights[jnp.clip(index, 0, 3)])


@pytest.mark.parametrize("jit", [False, True])
def test_nested_vmap(jit):
    weights = random_weights((2, 3, 64, 64))
    stack = compress(weights, stack_axes=2)
    index = jnp.array([2, 0])
    functions = [
        (jax.vmap(jax.vmap(decompress)), weights),
        (jax.vmap(decompress), weights),
        (decompress, weights),
        # payload and index; payload outside and index inside; the other way round
        (jax.vmap(lambda a: slice_at(index, a)), weights[:, index]),
        (lambda a: jax.vmap(slice_at)(index, a), weights[jnp.arange(2), index]),
        (
            jax.vmap(lambda a: jax.vmap(lambda i: slice_at(i, a))(index)),
            weights[:, index],
        ),
        (
            lambda a: jax.vmap(lambda i: jax.vmap(lambda a: slice_at(i, a))(a))(index),
            weights[:, index].swapaxes(0, 1),
        ),
    ]
    for function, expected in functions:
        assert_same_bits((jax.jit(function) if jit else function)(stack), expected)


@on_cpu
def test_vmap_of_indices_decodes_each_once(stack):
    function = jax.jit(jax.vmap(lambda i: slice_at(i, stack)))
    assert count_decodes(function, jnp.arange(3)) == 3


def test_grad_of_activations(weights, stack, x):
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))

    expected = jax.grad(loss)(x, weights[1])
    assert_same_bits(jax.grad(lambda x, a: loss(x, decompress(a[1])))(x, stack), expected)
    jitted = jax.jit(jax.grad(lambda x, a: loss(x, decompress(a[1]))))
    assert_same_bits(jitted(x, stack), jax.jit(jax.grad(loss))(x, weights[1]))


def test_derivatives_with_an_index_that_was_tied_to_activations(weights, stack, x):
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))

    def tied(x):
        index, _ = jax.lax.optimization_barrier((1, x))  # gives the index a tangent
        return loss(x, slice_at(index, stack))

    assert_same_bits(jax.grad(tied)(x), jax.grad(loss)(x, weights[1]))
    tangent = jnp.ones_like(x)
    expected = jax.jvp(lambda x: loss(x, weights[1]), (x,), (tangent,))
    np.testing.assert_array_equal(jax.jvp(tied, (x,), (tangent,)), expected)


def test_grad_does_not_see_weights(stack, x):
    gradients = jax.grad(
        lambda a, x: jnp.sum(x @ decompress(a)[0]).astype(jnp.float32), allow_int=True
    )(stack, x)
    assert all(g.dtype == jax.dtypes.float0 for g in jax.tree.leaves(gradients))


@on_cpu
def test_checkpoint_decodes_again(stack, x):
    def block(x, a):
        return jnp.tanh(x @ decompress(a) @ jnp.ones((128, 64), x.dtype))

    def loss(x, stack, block):
        for i in range(4):
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        return jnp.sum(x.astype(jnp.float32))

    # Not jitted as a whole: XLA's CPU backend merges the decodes that checkpoint keeps apart.
    remat = jax.checkpoint(block)
    assert count_decodes(lambda: jax.grad(loss)(x, stack, block)) == 4
    assert count_decodes(lambda: jax.grad(loss)(x, stack, remat)) == 8
    _, residuals = jax.vjp(lambda x: loss(x, stack, remat), x)
    assert all(leaf.shape != (64, 128) for leaf in jax.tree.leaves(residuals))
    assert_same_bits(jax.grad(loss)(x, stack, remat), jax.grad(loss)(x, stack, block))


def test_eval_shape(stack):
    out = jax.eval_shape(decompress, stack)
    assert (out.shape, out.dtype) == ((4, 64, 128), jnp.bfloat16)
    abstract = jax.eval_shape(lambda: stack)
    assert jax.eval_shape(decompress, abstract) == out


def test_shapes_are_not_decoded(stack):
    shapes = jax.eval_shape(lambda: stack)
    with pytest.raises(TypeError, match="a/w: expected compressed arrays, got their shapes"):
        decompress_params({"a": {"w": shapes}})


def test_in_host_memory(weights, stack):
    there = jax.device_put(stack, jax.memory.Space.Host)
    for function in (decompress_params, jax.jit(decompress_params)):
        with pytest.raises(ValueError, match="a/w: is in the host's memory"):
            function({"a": {"w": there}})
    assert_same_bits(decompress(jax.device_put(there, jax.memory.Space.Device)), weights)


def test_disable_jit(weights, stack):
    with jax.disable_jit():
        assert_same_bits(decompress(stack), weights)
        _, out = jax.lax.scan(lambda carry, a: (carry, decompress(a)), None, stack)
        assert_same_bits(out, weights)


def test_donation(weights, stack):
    copy = jax.tree.map(jnp.copy, stack)
    out, again = jax.jit(lambda a: (decompress(a), a), donate_argnums=0)(copy)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    assert_same_bits(out, weights)
    assert_same_bits(decompress(again), weights)


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda", "tpu")])
def test_export(weights, stack, x, platforms):
    function = jax.jit(lambda a, x: x @ decompress(a[2]))
    exported = export.export(function, platforms=platforms, disabled_checks=EXPORT_SAFETY_CHECKS)(
        stack, x
    )
    again = export.deserialize(exported.serialize())
    if platforms is None or jax.default_backend() in platforms:
        assert_same_bits(again.call(stack, x), function(stack, x))
    assert again.in_tree == jax.tree.structure(((stack, x), {}))


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cpu")[:2]
    if len(devices) < 2:
        pytest.skip("needs two CPU devices")
    return Mesh(np.array(devices), ("layers",))


def test_shard_map(weights, stack, mesh):
    split = P("layers")
    function = jax.jit(jax.shard_map(decompress, mesh=mesh, in_specs=split, out_specs=split))
    sharded = jax.device_put(stack, NamedSharding(mesh, split))
    out = function(sharded)
    assert_same_bits(out, weights)
    assert out.sharding == NamedSharding(mesh, split)
    assert "all-gather" not in function.lower(sharded).compile().as_text()


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_activations(weights, stack, x, mesh, check_vma):
    # Decoding has to wait for activations that differ between devices; the weights do not.
    def product(x, a):
        return x @ slice_at(1, a, after=x)

    function = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(P("layers"), P()),
        out_specs=P("layers"),
        check_vma=check_vma,
    )
    x = jax.device_put(jnp.concatenate([x, x]), NamedSharding(mesh, P("layers")))
    stack = jax.device_put(stack, NamedSharding(mesh, P()))
    assert_same_bits(jax.jit(function)(x, stack), jax.jit(jnp.matmul)(x, weights[1]))

    def loss(x):
        return jnp.sum(function(x, stack).astype(jnp.float32))

    expected = jax.grad(lambda x: jnp.sum((x @ weights[1]).astype(jnp.float32)))(x)
    assert_same_bits(jax.jit(jax.grad(loss))(x), expected)


def test_types_are_checked(stack):
    wrong = dataclasses.replace(stack, exponents=stack.exponents.astype(jnp.int32))
    with pytest.raises(
        ValueError, match=r"w: exponents is int32\[4, \d+\], expected uint32\[4, a mu"
    ):
        decompress_params({"w": wrong})
    odd = dataclasses.replace(stack, exponents=stack.exponents[:, :-1])
    with pytest.raises(ValueError, match=r"expected uint32.*a multiple of 4"):
        decompress(odd)


def test_strict_modes(weights, stack):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert_same_bits(jax.jit(lambda a: decompress(a))(stack), weights)
    with jax.enable_x64(True):
        assert_same_bits(jax.jit(lambda a: decompress(a))(stack), weights)


@pytest.mark.parametrize("count", [2, 40])  # fewer rows than the table has bands, and more
def test_strict_modes_of_rows_and_products(count):
    weights = random_weights((256, 128))
    table, indices, x = compress(weights, along_columns=True), jnp.arange(count), weights
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert_same_bits(take(table, indices), weights[:count])
        assert_same_bits(dot(x, table), x @ weights.T)


def test_explicit_meshes(weights, stack):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("layers",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.device_put(stack, NamedSharding(mesh, P("layers")))
    with pytest.raises(ValueError, match=r"tensor: is sharded over explicit axes.*shard_map"):
        decompress(split)
    everywhere = jax.device_put(stack, NamedSharding(mesh, P()))
    assert_same_bits(decompress(everywhere), weights)


@on_cpu
def test_many_tensors_are_one_call(weights, stack):
    other = random_weights((100,))
    params = {"a": stack, "b": {"c": stack, "d": [compress(other)]}, "e": compress(other)}
    function = jax.jit(decompress_params)
    text = function.lower(params).as_text()
    assert text.count("custom_call @df11_decode") == 2  # one for each shape of the stack axes
    assert "b/d/0" in text
    assert count_decodes(function, params) == 10
    assert_same_bits(function(params)["b"]["c"], weights)
    assert_same_bits(function(params)["e"], other)


@on_cpu
def test_very_many_tensors_are_several_calls():
    stacks = compress(random_weights((150, 8, 64)), stack_axes=1)
    params = {i: jax.tree.map(lambda part, i=i: part[i], stacks) for i in range(150)}
    function = jax.jit(decompress_params)
    text = function.lower(params).as_text()
    assert text.count("custom_call @df11_decode") == 2  # of 128 tensors, and of what is left
    out, expected = function(params), decompress(stacks)
    for i in range(150):
        assert_same_bits(out[i], expected[i])


def test_stacks_must_have_one_length(stack):
    shorter = stack[:2]
    with pytest.raises(ValueError, match="short: a stack of 2 slices, expected 4 like long"):
        decode_slices([stack, shorter], 0, names=["long", "short"])
    assert decode_slices([], 0) == []


def test_empty_stack(stack):
    (out,) = decode_slices([stack[:0]], jnp.int32(0))
    assert out.shape == (64, 128)
    assert decompress(stack[:0]).shape == (0, 64, 128)


@on_cpu
@pytest.mark.parametrize("jit", [False, True])
def test_corruption_raises_and_names_the_tensor(stack, jit):
    corrupt = dataclasses.replace(stack, sign_mantissa=stack.sign_mantissa.at[2, 7].add(1))
    params = {"layers": {"good": stack, "bad": corrupt}}
    function = jax.jit(decompress_params) if jit else decompress_params
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"layers/bad.* is corrupt.*slice 2"):
        jax.block_until_ready(function(params))
