"""`dot` where matrices are decoded first, and the calls that it makes for a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_programs import count_calls, needs_product
from jax import export
from jax.sharding import AxisType
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
from df11_jax import _ffi, _layout, _product

K, N = 192, 256


@pytest.fixture(scope="module")
def weights():
    return random_weights((K, N))


def rows(count, k=K):
    return random_weights((count, k), seed=7, scale=1.0)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (40,)], ids=str)
@pytest.mark.parametrize("out", [None, jnp.float32])
def test_is_the_product_of_plain_weights(weights, batch, out):
    x = random_weights((*batch, K), seed=1, scale=1.0)
    expected = jnp.dot(x, weights, preferred_element_type=out)
    actual = df11_jax.dot(x, df11_jax.compress(weights), preferred_element_type=out)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


def test_of_the_transpose():
    table = random_weights((N, K))
    a = df11_jax.compress(table, along_columns=True)
    assert_same_bits(df11_jax.dot(rows(4), a), rows(4) @ table.T)


def test_rows_may_be_several_axes():
    weights = random_weights((3, 64, N))
    assert_same_bits(
        df11_jax.dot(rows(4), df11_jax.compress(weights)), rows(4) @ weights.reshape(K, N)
    )
    weights = random_weights((K, 4, 64))
    assert_same_bits(
        df11_jax.dot(rows(4), df11_jax.compress(weights, row_axes=1)),
        rows(4) @ weights.reshape(K, N),
    )


@pytest.mark.parametrize("n", [64, 96])
@pytest.mark.parametrize("along_columns", [False, True])
def test_matrices_side_by_side(along_columns, n):
    weights = random_weights((3, n, K) if along_columns else (3, K, n))
    a = df11_jax.compress(weights, batch_axes=1, along_columns=along_columns)
    x = rows(2)
    spec = "tk,bnk->tbn" if along_columns else "tk,bkn->tbn"
    assert_same_bits(df11_jax.dot(x, a), jnp.einsum(spec, x, weights).reshape(2, 3 * n))
    assert _product.can_fuse(a, 2) == (n == 64 and bool(_product._platforms(2)))


def test_flat_views_are_not_fused():
    weights = random_weights((64, 24))  # as many numbers as a view of 24 x 64 has
    a, x = df11_jax.compress(weights, along_columns=True), random_weights((2, 24), 1, 1.0)
    assert a.layout.view.is_flat and not _product.can_fuse(a, 2)
    assert_same_bits(df11_jax.dot(x, a), jnp.einsum("tk,nk->tn", x, weights))


@pytest.mark.parametrize("out", [None, jnp.float32])
def test_some_may_be_plain(weights, out):
    x, a = rows(4), df11_jax.compress(weights)
    wide, small = random_weights((K, 4, 64), seed=1), weights[:, :4].astype(jnp.float32)
    actual = df11_jax.dot(
        x, [small, a, weights, a, wide.reshape(3, 64, N)], preferred_element_type=out
    )
    matrices = [small, weights, weights, weights, wide.reshape(K, N)]
    for y, matrix in zip(actual, matrices, strict=True):
        expected = jnp.dot(x, matrix, preferred_element_type=out)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)
    assert_same_bits(df11_jax.dot(x, weights), x @ weights)


def test_other_rows_than_bfloat16(weights):
    x = rows(4).astype(jnp.float32)
    np.testing.assert_array_equal(
        df11_jax.dot(x, df11_jax.compress(weights)), x @ weights.astype(jnp.float32)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "float8_e4m3fn"])
@pytest.mark.parametrize("out", [jnp.bfloat16, jnp.float32])
def test_other_rows_and_a_type_of_the_result(weights, dtype, out):
    x, a = rows(4).astype(jnp.float32).astype(dtype), df11_jax.compress(weights)
    with jax.numpy_dtype_promotion("strict"):  # a type that is asked for is no promotion
        actual = df11_jax.dot(x, a, preferred_element_type=out, exact=True)
        expected = jnp.dot(x, weights, preferred_element_type=out)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def test_rows_of_a_weak_type(weights):
    a, wide = df11_jax.compress(weights), weights.astype(jnp.float32)
    for x in (jnp.full((2, K), 0.3), jnp.full((2, K), 3)):
        assert x.weak_type
        for y, matrix in zip(df11_jax.dot(x, [a, wide]), (weights, wide), strict=True):
            assert y.dtype == (x @ matrix).dtype
            np.testing.assert_array_equal(y, x @ matrix)
    assert df11_jax.dot(x, a, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_several_matrices(weights):
    others = [weights, random_weights((K, 64), 3), random_weights((K, 128), 4)]
    results = df11_jax.dot(rows(2), [df11_jax.compress(w) for w in others])
    for actual, matrix in zip(results, others, strict=True):
        assert_same_bits(actual, rows(2) @ matrix)
    assert df11_jax.dot(rows(2), []) == []


def test_slices_of_stacks_of_several_lengths():
    weights = random_weights((4, K, 64))
    stacks = [df11_jax.compress(weights[:n], stack_axes=1) for n in (4, 2, 2)]

    @jax.jit
    def products(x, index):
        return df11_jax.dot(x, [df11_jax.DF11Slice(stack, index) for stack in stacks])

    for index, found in ((1, [1, 1, 1]), (3, [3, 1, 1])):
        for y, i in zip(products(rows(2), index), found, strict=True):
            assert_same_bits(y, rows(2) @ weights[i])
    if _ffi.product_platforms():
        assert count_calls(products, rows(2), 1) == [2, 0]


def test_slices_at_equal_integers():
    stack = df11_jax.compress(random_weights((3, K, 64)), stack_axes=1)
    slices = [df11_jax.DF11Slice(stack, i) for i in (np.int64(1), 1, np.int32(1), np.array(1), 2)]
    assert _product._runs(slices) == [(0, 4), (4, 5)]
    traced = [df11_jax.DF11Slice(stack, jnp.int32(1)) for _ in range(2)]
    assert _product._runs(traced) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
@needs_product
def test_slices_that_a_function_closes_over(transform):
    stack = df11_jax.compress(random_weights((3, K, 64)), stack_axes=1)

    def products(x, stack, index):
        slices = [df11_jax.DF11Slice(stack, index) for _ in range(3)]
        return transform(lambda x: df11_jax.dot(x, slices))(x)

    assert count_calls(products, rows(2), stack, 1) == [1, 0]


def test_slices_of_an_empty_stack():
    stack = df11_jax.compress(random_weights((3, K, 64)), stack_axes=1)[:0]
    product = jax.jit(lambda i: df11_jax.dot(rows(2), df11_jax.DF11Slice(stack, i)))
    assert_same_bits(product(0), jnp.zeros((2, 64), jnp.bfloat16))
    assert not _product.can_fuse(stack, 2)
    if _ffi.product_platforms():
        assert count_calls(product, 0) == [0, 0]


def test_transfers_that_users_forbid(weights):
    a, x = df11_jax.compress(weights), rows(2)
    with jax.transfer_guard("disallow"):
        actual = df11_jax.dot(x, a), df11_jax.decompress(a)
    assert_same_bits(actual[0], x @ weights)
    assert_same_bits(actual[1], weights)


@pytest.mark.parametrize("compressed", [True, False])
def test_blocks_of_a_scan(compressed):
    weights = random_weights((3, K, K))

    def block(x, params, _):
        matrix = params["w"]
        y = df11_jax.dot(x, matrix) if compressed else x @ matrix
        return jnp.tanh(y), None

    params = {"w": df11_jax.compress(weights, stack_axes=1) if compressed else weights}
    scan = jax.jit(lambda x, p: df11_jax.scan_blocks(block, x, p, lazy=compressed)[0])
    expected = rows(2)
    for matrix in weights:
        expected = jnp.tanh(expected @ matrix)
    np.testing.assert_array_equal(scan(rows(2), params), expected)
    if compressed:
        assert count_decodes(scan, rows(2), params) == 3


def test_a_slice_is_decompressed_where_it_lies():
    weights = random_weights((3, K, 64))
    a = df11_jax.DF11Slice(df11_jax.compress(weights, stack_axes=1), jnp.int32(2))
    assert a.shape == (K, 64) and a.dtype == jnp.bfloat16
    assert_same_bits(df11_jax.decompress(a), weights[2])
    assert_same_bits(df11_jax.dot(rows(1), a), rows(1) @ weights[2])


@pytest.mark.parametrize(
    ("index", "dtype", "found"),
    [
        (2**32 - 1, "uint32", 2),
        (2**32 + 1, "int64", 2),
        (-(2**33), "int64", 0),
        (2**63, "uint64", 2),
        (100, "int8", 2),
        (-5, "int8", 0),
        (1, "uint8", 1),
    ],
)
def test_indices_of_any_type_are_clamped(index, dtype, found):
    weights = random_weights((3, K, 64))
    stack = df11_jax.compress(weights, stack_axes=1)
    with jax.enable_x64(True):
        a = df11_jax.DF11Slice(stack, jnp.array(index, dtype))
        assert_same_bits(jax.jit(df11_jax.decompress)(a), weights[found])
        assert_same_bits(jax.jit(df11_jax.dot)(rows(1), a), rows(1) @ weights[found])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (-1, IndexError, r"no slice -1 in a stack of 3"),
        (np.int64(3), IndexError, r"no slice 3 in a stack of 3"),
        (1.0, TypeError, "dtype float32, expected integers"),
        (jnp.bool_(True), TypeError, "dtype bool, expected integers"),
    ],
)
def test_there_is_no_such_slice(index, error, message):
    stack = df11_jax.compress(random_weights((3, K, 64)), stack_axes=1)
    a = df11_jax.DF11Slice(stack, index)
    with pytest.raises(error, match=message):
        df11_jax.decompress(a)
    with pytest.raises(error, match="dot: matrix 0: .*" + message):
        df11_jax.dot(rows(1), a)


def test_indices_that_are_known():
    stack = df11_jax.compress(random_weights((3, K, 64)), stack_axes=1)
    some = df11_jax.decompress(df11_jax.DF11Slice(stack, np.array([2, -1])))
    assert_same_bits(some[0], df11_jax.decompress(stack[2]))
    with pytest.raises(IndexError, match="no slice -2"):
        df11_jax.decompress(df11_jax.DF11Slice(stack, np.array([2, -2])))
    with pytest.raises(TypeError, match=r"tensor: the index of a slice is \[2, 0\], expected"):
        df11_jax.decompress(df11_jax.DF11Slice(stack, [2, 0]))


def test_slices_of_what_stayed_plain():
    """The guide makes a `DF11Slice` of each leaf, and `compress_params` leaves small ones plain."""
    for plain in (np.ones((3, 8), jnp.bfloat16), jnp.ones((3, 8))):
        with pytest.raises(TypeError, match=rf"a DF11Array, got {plain.dtype}\[3, 8\], which is"):
            jax.jit(lambda i, plain=plain: df11_jax.DF11Slice(plain, i))(1)


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(k, n):
    weights = random_weights((k, n))
    a = df11_jax.compress(weights)
    assert_same_bits(jax.jit(df11_jax.dot)(rows(3, k), a), rows(3, k) @ weights)


@pytest.mark.parametrize("shape", [(0, 3, K), (3, 0, K)], ids=str)
def test_no_rows(weights, shape):
    a = df11_jax.compress(weights)
    x = jnp.zeros(shape, jnp.bfloat16)
    assert df11_jax.dot(x, a).shape == (*shape[:-1], N)
    assert jax.vmap(lambda x: df11_jax.dot(x, a))(x).shape == (*shape[:-1], N)


@pytest.mark.parametrize("function", [df11_jax.dot, jax.vmap(df11_jax.dot, in_axes=(0, None))])
def test_export_for_any_number_of_rows(weights, function):
    a = df11_jax.compress(weights)
    (count,) = export.symbolic_shape("rows")
    exported = export.export(jax.jit(function), disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS)(
        jax.ShapeDtypeStruct((count, K), jnp.bfloat16), a
    )
    assert_same_bits(exported.call(rows(5), a), rows(5) @ weights)


def test_gradients(weights):
    a = df11_jax.compress(weights)

    def loss(product):
        return lambda x: jnp.sum(product(x).astype(jnp.float32) ** 2)

    x = rows(3)
    actual = jax.jit(jax.grad(loss(lambda x: df11_jax.dot(x, a))))(x)
    assert_same_bits(actual, jax.jit(jax.grad(loss(lambda x: x @ weights)))(x))
    by_row = jax.vmap(jax.grad(loss(lambda x: df11_jax.dot(x, a))))(x)
    assert by_row.shape == x.shape


@pytest.mark.parametrize("lazy", [True, False])
def test_gradients_of_gradients_through_a_scan(lazy):
    weights = random_weights((2, K, K))
    stack = df11_jax.compress(weights, stack_axes=1)
    x = rows(_product.MOST_FUSED_ROWS + 1)

    def penalty(forward):
        def loss(x):
            return jnp.sum(forward(x).astype(jnp.float32) ** 2)

        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x).astype(jnp.float32) ** 2))

    def block(x, w, _):
        return jnp.tanh(df11_jax.dot(x, w)), None

    run_again = jax.checkpoint(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)))
    plain = jax.jit(penalty(lambda x: jax.lax.scan(run_again, x, weights)[0]))
    actual = jax.jit(penalty(lambda x: df11_jax.scan_blocks(block, x, stack, lazy=lazy)[0]))
    assert_same_bits(actual(x), plain(x))


def test_vmap(weights):
    a = df11_jax.compress(weights)
    assert_same_bits(jax.vmap(lambda x: df11_jax.dot(x, a))(rows(5)), rows(5) @ weights)
    both = jnp.stack([weights, random_weights((K, N), 9)])
    small = df11_jax.compress(both, stack_axes=1)
    actual = jax.vmap(df11_jax.dot, in_axes=(None, 0))(rows(2), small)
    assert_same_bits(actual, jnp.stack([rows(2) @ matrix for matrix in both]))


@needs_product
def test_calls_on_a_gpu(weights):
    a = df11_jax.compress(weights)
    few, many = rows(_product.MOST_FUSED_ROWS), rows(_product.MOST_FUSED_ROWS + 1)
    assert count_calls(df11_jax.dot, few, a) == [1, 0]
    assert count_calls(df11_jax.dot, many, a) == [0, 1]
    assert count_calls(lambda x, a: df11_jax.dot(x, a, exact=True), few, a) == [0, 1]
    assert count_calls(df11_jax.dot, few.astype(jnp.float32), a) == [0, 1]
    assert count_calls(lambda x, a: df11_jax.dot(x, [a, a, a]), few, a) == [1, 0]
    assert count_calls(jax.vmap(df11_jax.dot, in_axes=(0, None)), few, a) == [1, 0]
    heads = df11_jax.compress(random_weights((3, K, 64)), batch_axes=1)
    assert count_calls(lambda x, a: df11_jax.dot(x, [a, heads]), few, a) == [1, 0]
    flat = df11_jax.compress(random_weights((K, 100)))
    assert count_calls(df11_jax.dot, few, flat) == [0, 1]


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("are_weights_split", [False, True])
def test_shard_map_over_some_axes(weights, are_weights_split, axis_type):
    both = jnp.stack([weights, random_weights((K, N), 9)])
    a = df11_jax.compress(both, stack_axes=1)
    mesh = jax.make_mesh((2, 1), ("x", "y"), axis_types=(axis_type,) * 2)
    spec, x = jax.P("x"), rows(4)
    specs = spec, spec if are_weights_split else jax.P()
    function = jax.shard_map(
        lambda x, a: df11_jax.dot(x, a[0]), in_specs=specs, out_specs=spec, axis_names={"x"}
    )
    expected = jnp.concatenate([x[:2] @ both[0], x[2:] @ both[int(are_weights_split)]])
    # With explicit axes, shard_map takes what is divided as it says only.
    x, a = jax.device_put((x, a), tuple(jax.NamedSharding(mesh, spec) for spec in specs))
    with jax.set_mesh(mesh):
        assert_same_bits(jax.jit(function)(x, a), expected)
        if _ffi.product_platforms():
            assert count_calls(function, x, a) == [1, 0]


def test_is_compiled_once_outside_of_jit(weights):
    a = df11_jax.compress(weights)
    df11_jax.dot(rows(2), a)
    before = _product._choose._cache_size()
    assert_same_bits(df11_jax.dot(rows(2), a), rows(2) @ weights)
    assert _product._choose._cache_size() == before


def test_workspace():
    views = [_layout.make_layout((4096, n)).view for n in (4096, 1024)]
    # 64 and 16 columns of chunks; 2,048 chunks of 128 rows, and 1,024 of 64: an item each.
    assert _product.workspace_words(views, 3) == 64 * 3 * (2048 + 1024)


def test_what_cannot_be_multiplied(weights):
    a = df11_jax.compress(weights)
    with pytest.raises(ValueError, match=r"x has shape \(2, 191\), expected \[\.\.\., 192\]"):
        df11_jax.dot(rows(2, 191), a)
    with pytest.raises(TypeError, match="has to be bfloat16 or float32, got float16"):
        df11_jax.dot(rows(2), a, preferred_element_type=jnp.float16)
    for wrong in ([a, "a"], [a, None]):
        with pytest.raises(TypeError, match=r"matrix 1: expected a DF11Array, .* got"):
            df11_jax.dot(rows(2), wrong)
    with pytest.raises(TypeError, match=r"matrix 0: expected .* got NoneType"):
        df11_jax.dot(rows(2), None)
    with pytest.raises(ValueError, match=r"matrix 0 is an array of shape \(192,\)$"):
        df11_jax.dot(rows(2), weights[:, 0])
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 96\] for matrix 1 of shape"):
        df11_jax.dot(rows(2), [a, weights[:96]])
    for shapes in (jax.eval_shape(lambda: a), jax.eval_shape(lambda: df11_jax.DF11Slice(a, 0))):
        with pytest.raises(TypeError, match="dot: matrix 1: expected compressed arrays, got their"):
            df11_jax.dot(rows(2), [a, shapes])
    short = dataclasses.replace(a, sign_mantissa=a.sign_mantissa[:-4])
    with pytest.raises(ValueError, match="dot: matrix 1: sign_mantissa is"):
        df11_jax.dot(rows(2), [a, short])
    with pytest.raises(ValueError, match="is a stack"):
        df11_jax.dot(rows(2), df11_jax.compress(weights[None], stack_axes=1))
    several = df11_jax.DF11Slice(df11_jax.compress(weights[None], stack_axes=1), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"is of several slices, at an index of shape \(2,\)"):
        df11_jax.dot(rows(2), several)
    with pytest.raises(ValueError, match="are no matrices"):
        df11_jax.dot(rows(2), df11_jax.compress(random_weights((K,))))
    with pytest.raises(ValueError, match="are no matrices"):
        df11_jax.dot(rows(2), df11_jax.compress(random_weights((2, K, 64)), row_axes=0))
