"""Rows of compressed matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
from df11_jax import _take

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")

ROWS, COLUMNS = 505, 128  # 8 bands, the last one not full


@pytest.fixture(scope="module")
def weights():
    bits = np.array(random_weights((ROWS, COLUMNS))).view(np.uint16)
    bits[3], bits[ROWS - 1] = 0x8000, 0x7FC1  # negative zeros, and NaNs
    return jnp.asarray(bits.view(jnp.bfloat16))


@pytest.fixture(scope="module")
def table(weights):
    return df11_jax.compress(weights, along_columns=True)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (8,), (5, 40)], ids=str)
@pytest.mark.parametrize("bands_at_once", [1, 3, 100])
def test_rows(weights, table, shape, bands_at_once, monkeypatch):
    monkeypatch.setattr(_take, "PIECE_BYTES", bands_at_once * 2 * 64 * COLUMNS)
    indices = np.random.default_rng(0).integers(-ROWS, ROWS, shape)
    indices.reshape(-1)[:3] = np.array([3, ROWS - 1, -1])[: indices.size]
    rows = jax.jit(lambda a, i: df11_jax.take(a, i))(table, indices)
    assert_same_bits(rows, weights[indices])


def test_rows_that_there_are_not(weights, table):
    indices = [ROWS, -ROWS - 1, 2**31 - 1, -(2**31), 0]
    assert_same_bits(df11_jax.take(table, indices), jnp.take(weights, jnp.array(indices), axis=0))
    with jax.enable_x64(True):
        wide = jnp.array([2**32, -(2**32), 7])
        rows = df11_jax.take(table, wide)
    assert jnp.isnan(rows[:2]).all()
    assert_same_bits(rows[2], weights[7])
    assert_same_bits(
        df11_jax.take(table, np.array([255, 7], np.uint8)), weights[np.array([255, 7])]
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((ROWS, COLUMNS), {}),
        ((70, 200), {"along_columns": True}),  # flat
        ((4, 64, 128), {"along_columns": True}),  # both first axes are rows
        ((512, 2, 64), {"row_axes": 1, "along_columns": True}),
        ((1000,), {}),
    ],
    ids=str,
)
def test_any_tensor(shape, options):
    bits = np.array(random_weights(shape)).view(np.uint16)
    bits[1] = 0x7FC1
    weights = jnp.asarray(bits.view(jnp.bfloat16))
    a = df11_jax.compress(weights, **options)
    indices = jnp.array([[3, 1], [0, -1]])
    assert_same_bits(df11_jax.take(a, indices), weights[indices])
    assert_same_bits(df11_jax.take(weights, indices), jnp.take(weights, indices, axis=0))


@on_cpu
def test_only_bands_of_the_rows_are_decompressed(table):
    assert count_decodes(df11_jax.take, table, jnp.array([1, 70, 71])) == 3
    assert count_decodes(df11_jax.take, table, jnp.arange(100)) == 8


@on_cpu
def test_slices_of_a_stack():
    weights = random_weights((3, 256, COLUMNS))
    stack = df11_jax.compress(weights, stack_axes=1, along_columns=True)
    indices = jnp.array([200, 0])

    @jax.jit
    def rows(stack, i):
        return df11_jax.take(df11_jax.DF11Slice(stack, i), indices)

    for i in range(3):
        assert_same_bits(rows(stack, i), weights[i, indices])
        assert_same_bits(df11_jax.take(stack[i], indices), weights[i, indices])
    assert count_decodes(rows, stack, 1) == 2


def test_transformations(weights, table):
    indices = jnp.array([[4, 500], [77, 3]])
    assert_same_bits(jax.vmap(df11_jax.take, (None, 0))(table, indices), weights[indices])

    def loss(scale, indices):
        rows = jax.checkpoint(df11_jax.take)(table, indices)
        return (scale * rows.astype(jnp.float32)).sum()

    expected = weights[indices[0]].astype(jnp.float32).sum()
    assert jax.grad(loss)(1.0, indices[0]) == expected
    shapes = jax.eval_shape(df11_jax.take, table, indices)
    assert (shapes.shape, shapes.dtype) == ((2, 2, COLUMNS), jnp.bfloat16)
    scanned = jax.lax.scan(lambda c, i: (c, df11_jax.take(table, i)), 0, indices)[1]
    assert_same_bits(scanned, weights[indices])


def test_exported_for_any_number_of_rows(weights, table):
    (n,) = export.symbolic_shape("n")
    indices = jax.ShapeDtypeStruct((n,), jnp.int32)
    exported = export.export(jax.jit(df11_jax.take), disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS)(
        table, indices
    )
    for wanted in ([2], [504, 0, 99]):
        assert_same_bits(exported.call(table, jnp.array(wanted)), weights[jnp.array(wanted)])


@pytest.mark.parametrize(
    ("make", "indices", "error", "message"),
    [
        (lambda a: a, [1.5], TypeError, "take: indices are float32, expected integers"),
        (lambda a: "a", [1], TypeError, "take: expected a DF11Array, .* got str"),
        (lambda a: df11_jax.stack([a, a]), [1], ValueError, "take: got a stack, DF11Array"),
        (
            lambda a: df11_jax.DF11Slice(df11_jax.stack([a, a]), jnp.array([0, 1])),
            [1],
            ValueError,
            r"take: expected one tensor with rows, got shape \(2, 505, 128\)",
        ),
        (lambda a: df11_jax.compress(a.sum()), [0], ValueError, "take: expected one tensor"),
        (lambda a: df11_jax.DF11Slice(df11_jax.stack([a]), 3), [0], IndexError, "no slice 3 in a"),
    ],
)
def test_bad_arguments(table, make, indices, error, message):
    with pytest.raises(error, match=message):
        df11_jax.take(make(table), jnp.array(indices))
