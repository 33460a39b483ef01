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
    """On the host, as XLA may change NaNs of plain rows that it picks."""
    bits = np.array(random_weights((ROWS, COLUMNS))).view(np.uint16)
    bits[3], bits[ROWS - 1] = 0x8000, 0x7FC1  # negative zeros, and NaNs
    return bits.view(jnp.bfloat16)


@pytest.fixture(scope="module")
def table(weights):
    return df11_jax.compress(weights, along_columns=True)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (8,), (5, 40)], ids=str)
@pytest.mark.parametrize("bands_at_once", [1, 3, 100])
def test_rows(weights, table, shape, bands_at_once, monkeypatch):
    jax.clear_caches()  # of pieces of another size
    monkeypatch.setattr(_take, "PIECE_BYTES", bands_at_once * 2 * 64 * COLUMNS)
    indices = np.random.default_rng(0).integers(-ROWS, ROWS, shape)
    indices.reshape(-1)[:3] = np.array([3, ROWS - 1, -1])[: indices.size]
    rows = jax.jit(lambda a, i: df11_jax.take(a, i))(table, indices)
    assert_same_bits(rows, weights[indices])


def test_rows_that_there_are_not(weights, table):
    indices = [ROWS, -ROWS - 1, 2**31 - 1, -(2**31), 0]
    assert_same_bits(
        df11_jax.take(table, indices), jnp.take(jnp.asarray(weights), jnp.array(indices), axis=0)
    )
    with jax.enable_x64(True):
        wide = jnp.array([2**32, -(2**32), 7])
        rows = df11_jax.take(table, wide)
    assert jnp.isnan(rows[:2]).all()
    assert_same_bits(rows[2], weights[7])
    few = df11_jax.take(table, jnp.array([-3, 7], jnp.int4))
    assert_same_bits(few, weights[jnp.array([-3, 7])])
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
    weights = bits.view(jnp.bfloat16)
    a = df11_jax.compress(weights, **options)
    indices = jnp.array([[3, 1], [0, -1]])
    assert_same_bits(df11_jax.take(a, indices), weights[indices])
    weights = jnp.asarray(weights)
    assert_same_bits(df11_jax.take(weights, indices), jnp.take(weights, indices, axis=0))


@on_cpu
def test_only_bands_of_the_rows_are_decompressed(table):
    assert count_decodes(df11_jax.take, table, jnp.array([1, 70, 71])) == 3
    assert count_decodes(df11_jax.take, table, jnp.arange(100)) == 8


@pytest.mark.parametrize("count", [2, 100])  # fewer than there are bands, and more
def test_is_compiled_once_outside_of_jit(weights, table, count, caplog):
    indices, expected = jnp.arange(count), weights[:count]
    df11_jax.take(table, indices)
    with jax.log_compiles():
        assert_same_bits(df11_jax.take(table, indices), expected)
    assert not [message for message in caplog.messages if message.startswith("Compiling")]


@pytest.mark.parametrize("count", [2, 100])  # fewer than there are bands, and more
def test_where_transfers_are_forbidden(weights, table, count):
    indices = jnp.arange(-count, count)
    with jax.transfer_guard("disallow"):  # as jnp.take of an array on the device
        rows = df11_jax.take(table, indices)
    assert_same_bits(rows, weights[indices])


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


@pytest.mark.parametrize("count", [3, 40])  # fewer than there are bands, and more
def test_slices_of_an_empty_stack(table, count):
    stack, indices = df11_jax.stack([table])[:0], jnp.arange(count)
    rows = jax.jit(lambda i: df11_jax.take(df11_jax.DF11Slice(stack, i), indices))(0)
    assert_same_bits(rows, jnp.zeros((count, COLUMNS), jnp.bfloat16))


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


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("count", [4, 40])  # of each device: fewer than there are bands, and more
@pytest.mark.parametrize("others", [(), ("y",)])  # axes that are not the function's own
def test_shard_map(count, others):
    weights = random_weights((2, 512, COLUMNS))
    stack = df11_jax.compress(weights, stack_axes=1, along_columns=True)
    axes = ("x", *others)
    shape, auto = (2, *[1] * len(others)), jax.sharding.AxisType.Auto
    mesh = jax.make_mesh(shape, axes, axis_types=(auto,) * len(axes))
    options = {"mesh": mesh, "axis_names": {"x"}}
    spec, whole = jax.P("x"), jax.P()
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 512, 2 * count))

    def of_own(stack, i):  # each device has a slice, and its own rows
        return df11_jax.take(stack[0], i)

    rows = jax.jit(jax.shard_map(of_own, **options, in_specs=(spec, spec), out_specs=spec))
    expected = [weights[i, indices[i * count : (i + 1) * count]] for i in range(2)]
    assert_same_bits(rows(stack, indices), jnp.concatenate(expected))
    rows = jax.jit(jax.shard_map(df11_jax.take, **options, in_specs=(whole, spec), out_specs=spec))
    assert_same_bits(rows(stack[0], indices), weights[0, indices])


@on_cpu
def test_mapped_rows_count_together(weights, table):
    indices = np.random.default_rng(0).integers(0, ROWS, (6, 4))
    look_up = jax.jit(jax.vmap(df11_jax.take, (None, 0)))
    assert_same_bits(look_up(table, indices), weights[indices])
    assert count_decodes(look_up, table, indices) == 8  # all bands, and not one for each row
    stack = df11_jax.stack([table, table])
    both = jax.vmap(jax.vmap(df11_jax.take, (None, 0)))(stack, jnp.stack([indices, indices[::-1]]))
    assert_same_bits(both, jnp.stack([weights[indices], weights[indices[::-1]]]))


@pytest.mark.parametrize("count", [3, 40])
def test_gradients_beside_it(weights, table, count):
    indices = jnp.arange(count)

    def loss(scale):
        return (scale * df11_jax.take(table, indices).astype(jnp.float32)[:3]).sum()

    expected = weights[:3].astype(jnp.float32).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(2.0), expected, rtol=1e-5)


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
