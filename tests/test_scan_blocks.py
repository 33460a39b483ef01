"""`scan_blocks`: the same bits as the plain program, one decompressed block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mostly_slow import mostly_slow
from payloads import assert_same_bits, bits, count_decodes, random_weights
from scanned_blocks import (
    BLOCK_BYTES,
    LAYERS,
    TENSORS,
    WIDTH,
    X,
    block,
    forward,
    make_params,
    on_cpu,
    temp_bytes,
)

from df11_jax import DF11Slice, compress, decompress, scan_blocks
from df11_jax._scan import scan_range


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def one_layer():
    return make_params(1)


@pytest.fixture(scope="module")
def x():
    return X


def reference(params, x):
    return jax.lax.scan(lambda x, p: block(x, p, None), x, params)


# What is computed.


def test_same_bits_as_the_plain_program(params, x):
    plain, compressed = params
    for function in (jax.jit(forward), forward):
        carry, ys = function(compressed, x)
        assert_same_bits(carry, function(plain, x)[0])
        assert_same_bits(ys, function(plain, x)[1])
    assert_same_bits(jax.jit(forward)(plain, x)[0], jax.jit(reference)(plain, x)[0])


@pytest.mark.parametrize("lazy", [False, True])
def test_in_reverse(params, x, lazy):
    plain, compressed = params
    xs = jnp.arange(jax.tree.leaves(plain)[0].shape[0], dtype=x.dtype)

    def run(x, params):
        def body(x, params, i):
            plain = jax.tree.map(decompress, params, is_leaf=lambda p: isinstance(p, DF11Slice))
            return block(x, plain, i)[0] + i, i

        return scan_blocks(body, x, params, xs, reverse=True, lazy=lazy)

    carry, ys = jax.jit(run)(x, compressed)
    expected, expected_ys = jax.jit(
        lambda x, p: jax.lax.scan(
            lambda x, step: (block(x, *step)[0] + step[1], step[1]), x, (p, xs), reverse=True
        )
    )(x, plain)
    assert_same_bits(carry, expected)
    assert_same_bits(ys, expected_ys)


@pytest.mark.parametrize("reverse", [False, True])
def test_where_transfers_are_forbidden(params, x, reverse):
    plain, compressed = ({"up": p["mlp"]["up"][:2], "down": p["mlp"]["down"][:2]} for p in params)

    def step(x, p, _):
        return jnp.tanh(x @ p["up"]) @ p["down"], None

    def run(params):
        return scan_blocks(step, x, params, reverse=reverse)[0]

    with jax.transfer_guard("disallow"):  # as jax.lax.scan of arrays on the device
        y = run(compressed)
    assert_same_bits(y, run(plain))


def test_every_bit_pattern():
    # XLA changes payloads of NaNs on CPUs, of plain weights as well, but not of other numbers.
    patterns = np.arange(2**16, dtype=np.uint16).reshape(2, 128, 256)

    def copy(carry, weights, _):
        return carry, (weights, jax.lax.bitcast_convert_type(weights, jnp.uint16))

    stack = compress(patterns.view(jnp.bfloat16), stack_axes=1)
    _, (weights, as_decoded) = jax.jit(lambda stack: scan_blocks(copy, 0, stack))(stack)
    np.testing.assert_array_equal(as_decoded, patterns)
    is_nan = patterns & 0x7FFF > 0x7F80
    returned = bits(weights)
    np.testing.assert_array_equal(returned[~is_nan], patterns[~is_nan])
    np.testing.assert_array_equal(np.isnan(weights), is_nan)
    np.testing.assert_array_equal(returned[is_nan] >> 15, patterns[is_nan] >> 15)


def test_one_layer(one_layer, x):
    plain, compressed = one_layer
    assert_same_bits(jax.jit(forward)(compressed, x)[0], jax.jit(forward)(plain, x)[0])


def test_no_layers(params, x):
    _, compressed = params
    carry, ys = forward(jax.tree.map(lambda leaf: leaf[:0], compressed), x)
    assert_same_bits(carry, x)
    assert ys.shape == (0,)


def test_xs_and_a_cache_in_the_carry(params, x):
    def with_cache(carry, p, x):
        h, cache, key, at = carry
        key, used = jax.random.split(key)
        h, y = block(h + x + jax.random.normal(used, h.shape, h.dtype), p, None)
        return (h, cache.at[at].set(h), key, at + 1), {"y": y}

    plain, compressed = params
    xs = random_weights((LAYERS, WIDTH), 5)
    carry = (x, jnp.zeros((LAYERS, WIDTH), x.dtype), jax.random.key(0), jnp.int32(0))
    run = jax.jit(lambda p: scan_blocks(with_cache, carry, p, xs))
    (h, cache, key, at), ys = run(compressed)
    (h0, cache0, key0, at0), ys0 = run(plain)
    for actual, expected in ((h, h0), (cache, cache0), (ys["y"], ys0["y"])):
        assert_same_bits(actual, expected)
    assert key == key0 and at == at0 == LAYERS


def test_a_carry_without_arrays(params):
    plain, compressed = params

    def one(carry, p, x):
        return carry, jnp.max(p["mlp"]["up"]) + x.astype(jnp.bfloat16)

    for carry in (None, (), {"key": jax.random.key(0)}):
        run = jax.jit(lambda p, carry=carry: scan_blocks(one, carry, p, jnp.arange(LAYERS))[1])
        assert_same_bits(run(compressed), run(plain))


@pytest.mark.slow
def test_vmap_over_activations_and_over_models(params, x):
    plain, compressed = params
    xs = jnp.stack([x, 2 * x])
    run = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
    assert_same_bits(run(compressed, xs)[0], run(plain, xs)[0])
    two_plain, two = (jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), p) for p in params)
    run = jax.jit(jax.vmap(forward, in_axes=(0, None)))
    assert_same_bits(run(two, x)[0], run(two_plain, x)[0])


@pytest.mark.slow
def test_disable_jit(params, x):
    plain, compressed = (jax.tree.map(lambda leaf: leaf[:2], p) for p in params)
    with jax.disable_jit():
        assert_same_bits(forward(compressed, x)[0], forward(plain, x)[0])


@pytest.mark.parametrize("check_vma", mostly_slow([True, False]))
def test_shard_map_over_the_batch(params, x, check_vma):
    devices = jax.devices("cpu")[:2]
    if len(devices) < 2:
        pytest.skip("needs two CPU devices")
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    spec, everywhere = jax.P("batch"), jax.NamedSharding(mesh, jax.P())
    run = jax.shard_map(
        lambda x, p: jax.vmap(lambda x: forward(p, x)[0])(x),
        mesh=mesh,
        in_specs=(spec, jax.P()),
        out_specs=spec,
        check_vma=check_vma,
    )
    plain, compressed = (jax.device_put(p, everywhere) for p in params)
    xs = jax.device_put(jnp.stack([x, 2 * x]), jax.NamedSharding(mesh, spec))
    assert_same_bits(jax.jit(run)(xs, compressed), jax.jit(run)(xs, plain))
    text = jax.jit(run).lower(xs, compressed).compile().as_text()
    assert "all-gather" not in text

    def loss(xs, p):
        return jnp.sum(run(xs, p).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))
    assert_same_bits(gradient(xs, compressed), gradient(xs, plain))


# Parts of a stack.


def in_ranges(params, x, counts=(3, 1, 4)):
    """The blocks of a stack, some at a time."""
    carry, index = x, 0
    for count in counts:
        carry, index = scan_range(
            lambda x, p, index: block(x, p, None)[0], carry, params, index, count
        )
    return carry, index


def test_ranges_are_the_whole_in_the_end(params, x):
    for which in params:
        carry, end = jax.jit(in_ranges)(which, x)
        assert_same_bits(carry, jax.jit(forward)(which, x)[0])
        assert end == LAYERS


def test_range_in_a_loop_that_says_where_it_begins(params, x):
    """Blocks 0 and 1, 2 and 3, and so on; each adds its index."""

    def add(carry, p, index):
        x, indices = carry
        return block(x, p, None)[0], indices.at[index].set(index)

    def run(p, x):
        def pair(_, state):
            carry, begin = state
            return scan_range(add, carry, p, begin, 2)

        carry = x, jnp.full(LAYERS, -1)
        return jax.lax.fori_loop(0, LAYERS // 2, pair, (carry, jnp.int32(0)))[0]

    for which in params:
        carry, indices = jax.jit(run)(which, x)
        assert_same_bits(carry, jax.jit(forward)(which, x)[0])
        np.testing.assert_array_equal(indices, np.arange(LAYERS))


@on_cpu
def test_ranges_decode_each_block_once_a_token_and_hold_one(params, x):
    def run(p, x, counts=(3, 1, 4)):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(in_ranges(p, x, counts)[0]), x)

    _, compressed = params
    assert count_decodes(jax.jit(run), compressed, x) == 5 * LAYERS * TENSORS
    whole = temp_bytes(lambda p, x: run(p, x, (LAYERS,)), compressed, x)
    assert temp_bytes(run, compressed, x) < whole + BLOCK_BYTES / 4


@pytest.mark.slow
def test_gradients_in_ranges_are_the_same_bits(params, x):
    def loss(x, p):
        return jnp.sum(in_ranges(p, x)[0].astype(jnp.float32))

    plain, compressed = params
    gradient = jax.jit(jax.grad(loss))
    assert_same_bits(gradient(x, compressed), gradient(x, plain))


# Errors.


def test_errors_name_the_leaf(params, x):
    plain, compressed = params
    short = compressed | {"scale": plain["scale"][:5]}
    with pytest.raises(
        ValueError, match=r"stacked_params: scale: expected 8 blocks, like .*: bias, got 5"
    ):
        forward(short, x)
    other = compressed | {"mlp": {"up": compressed["mlp"]["up"][:3]}}
    with pytest.raises(ValueError, match=r"stacked_params: mlp/up: expected 8 blocks.*got 3"):
        forward(other, x)
    with pytest.raises(ValueError, match=r"xs: cache/0: expected 8 blocks.*got 2"):
        scan_blocks(block, x, compressed, {"cache": [jnp.zeros(2)]})
    with pytest.raises(ValueError, match=r"xs: tensor: expected blocks stacked.*got a scalar"):
        scan_blocks(block, x, compressed, jnp.float32(0))


def test_errors_about_stack_axes(params, x):
    _, compressed = params
    single = {"w": compressed["mlp"]["up"][0]}
    with pytest.raises(
        ValueError, match=r"w: expected a DF11Array with exactly one stack axis.*stacked=\.\.\."
    ):
        scan_blocks(block, x, single)
    double = jax.tree.map(lambda leaf: leaf[None], compressed["mlp"]["up"])
    with pytest.raises(ValueError, match=r"got 2 of shape \(1, 8\).*jax.lax.scan over the others"):
        scan_blocks(block, x, {"w": double})


def test_nothing_to_scan_over(x):
    with pytest.raises(ValueError, match="nothing to scan over"):
        scan_blocks(block, x, {})


def test_block_that_returns_no_pair(params, x):
    with pytest.raises(TypeError, match="block_fn must return"):
        scan_blocks(lambda x, weights, _: x, x, params)
