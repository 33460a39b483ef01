import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from payloads import assert_same_bits, random_weights

from df11_jax import _ffi, _layout, compress
from df11_jax._array import DF11Array, DF11Slice
from df11_jax._decode import decompress, decompress_params
from df11_jax._layout import Layout, make_layout


@pytest.fixture(scope="module")
def stacked():
    weights = random_weights((3, 64, 128))
    return weights, compress(weights, stack_axes=1)


@pytest.mark.parametrize("stack_ndim", [0, 1, 2])
def test_describes_what_it_stands_for(stack_ndim):
    weights = random_weights((2, 3, 64, 64))
    a = compress(weights, stack_axes=stack_ndim)
    assert a.shape == weights.shape
    assert a.stack_shape == weights.shape[:stack_ndim]
    assert a.slice_shape == weights.shape[stack_ndim:]
    assert (a.ndim, a.dtype, a.size, a.nbytes) == (4, jnp.bfloat16, 24576, 49152)
    assert a.compressed_nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(a))
    assert_same_bits(decompress(a), weights)


def test_is_a_pytree_with_named_leaves(stacked):
    _, a = stacked
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(a)]
    assert paths == [f".{name}" for name in _layout.PAYLOAD]
    assert jax.tree.structure(a) == jax.tree.structure(a[0])
    assert all(leaf.dtype == jnp.uint32 for leaf in jax.tree.leaves(a))


def test_is_frozen(stacked):
    _, a = stacked
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.layout = None


def test_tree_map_takes_slices(stacked):
    weights, a = stacked
    one = jax.tree.map(lambda leaf: leaf[1], a)
    assert one.shape == (64, 128)
    assert_same_bits(decompress(one), weights[1])
    again = jax.tree.map(lambda *leaves: jnp.stack(leaves), *a)
    assert_same_bits(decompress(again), weights)


@pytest.mark.parametrize("index", [0, -1, np.int64(2), slice(1, None), np.array([2, 0])])
def test_indexing_takes_slices(stacked, index):
    weights, a = stacked
    assert_same_bits(decompress(a[index]), weights[index])


def test_indexing_with_a_tracer(stacked):
    weights, a = stacked
    assert_same_bits(jax.jit(lambda i: decompress(a[i]))(2), weights[2])


def test_indexing_errors(stacked):
    _, a = stacked
    with pytest.raises(IndexError, match="out of bounds for a stack of 3"):
        a[3]
    with pytest.raises(TypeError, match=r"got \(0, 1\)"):
        a[0, 1]
    for mask in (True, np.False_):
        with pytest.raises(TypeError, match=f"got .*{mask}"):
            a[mask]
    for use in (lambda: a[0][0], lambda: list(a[0])):
        with pytest.raises(TypeError, match=r"\[64,128\].* no stack axis .*decompress\(a\)\[index"):
            use()
    with pytest.raises(TypeError, match=r"DF11Slice.* no stack axis to index"):
        DF11Slice(a, 0)[0]
    assert len(list(a)) == 3


def test_repr(stacked):
    _, a = stacked
    rate = 8 * a.compressed_nbytes / a.size
    expected = f"DF11Array(bfloat16[3,64,128], {rate:.2f} bits/weight)"
    assert repr(a) == expected
    assert repr(jax.eval_shape(lambda: a)) == expected
    seen = []
    jax.jit(lambda a: seen.append(repr(a)))(a)
    jax.vmap(lambda a: seen.append(repr(a)))(a)
    assert seen == [expected, expected.replace("3,64", "64")]
    assert repr(compress(jnp.zeros((0, 4), jnp.bfloat16))) == "DF11Array(bfloat16[0,4])"


@pytest.mark.parametrize("leaf", [None, "name", 3, object(), (1, 2), jax.P("x")])
def test_repr_of_odd_leaves(stacked, leaf):
    _, a = stacked
    odd = jax.tree.map(lambda _: leaf, a)
    assert "DF11Array" in repr(odd)
    assert repr(DF11Array(*[leaf] * 6))


def test_decompress_params_touches_nothing_else(stacked):
    weights, a = stacked
    other = np.ones(3)
    params = {"a": a, "b": [other, a[0]], "none": None, "name": "x"}
    result = decompress_params(params)
    assert_same_bits(result["a"], weights)
    assert_same_bits(result["b"][1], weights[0])
    assert result["b"][0] is other
    assert result["name"] == "x"
    assert decompress_params({}) == {}


def test_slices_at_the_same_index_are_decompressed_by_one_call():
    plain = {"a": random_weights((2, 3, 64, 64), 1), "b": random_weights((2, 3, 130, 70), 2)}
    stacks = {name: compress(weights, stack_axes=2) for name, weights in plain.items()}

    @jax.jit
    def take(stacks, index):
        slices = {name: DF11Slice(stack, index) for name, stack in stacks.items()}
        assert slices["a"].shape == (*index.shape, 64, 64)
        return decompress_params(slices), decompress(slices["a"])

    for index in (np.array(4), np.array([5, -1, 0])):
        text = take.lower(stacks, index).as_text()
        assert text.count(f"@{_ffi.DECODE_TARGET}(") == 2
        weights, again = take(stacks, index)
        for name, decoded in (*weights.items(), ("a", again)):
            flat = np.asarray(plain[name]).reshape(6, *plain[name].shape[2:])
            assert_same_bits(np.asarray(decoded)[index >= 0], flat[index][index >= 0])


@pytest.mark.parametrize("other", [[], {"a": np.ones(3)}, None, 1.0])
def test_decompress_refuses_other_things(other):
    with pytest.raises(TypeError, match=f"a DF11Array or an array, got {type(other).__name__}"):
        decompress(other)


def test_decompress_returns_arrays_as_they_are():
    for array in (np.zeros(3), jnp.ones((2, 2), jnp.bfloat16)):
        assert decompress(array) is array
    assert jax.jit(lambda x: decompress(x) is x)(1.0)


def test_arrays_that_do_not_fit(stacked):
    _, a = stacked
    short = dataclasses.replace(a, sign_mantissa=a.sign_mantissa[:, :-1])
    with pytest.raises(
        ValueError,
        match=r"block/kernel: sign_mantissa is uint32\[3, 2047\], expected uint32\[3, 2048\]",
    ):
        decompress_params({"block": {"kernel": short}})
    with pytest.raises(ValueError, match=r"codebook is uint32\[2, 36\], expected uint32\[3, 36\]"):
        decompress(dataclasses.replace(a, codebook=a.codebook[:2]))
    behind = jax.vmap(lambda a: a, out_axes=1)(a)
    with pytest.raises(ValueError, match=r"header is uint32\[28, 3\].* Its 28 words.*out_axes=0"):
        decompress(behind)


@pytest.mark.parametrize(
    ("shape", "k", "n"),
    [
        ((), 1, 64),
        ((1,), 1, 64),
        ((65,), 2, 64),
        ((0, 64), 0, 64),
        ((64, 64), 64, 64),
        ((16, 64), 16, 64),
        ((15, 64), 15, 64),  # flat: rows would be padded by 1/15, but the flat view is the same
        ((192, 512), 192, 512),
        ((3, 64, 256), 192, 256),
        ((1, 100_000), 1563, 64),
        ((4096, 4096 + 8), 4096, 4104),  # 1.4 % padding
        ((2048, 1376), 2048, 1376),  # 2.3 %
        ((2048, 1368), 2048, 1368),  # 2.9 %
        ((2048, 1360), 2048 * 1360 // 64, 64),  # 3.5 %, more than 1/32
        ((800, 88), 1100, 64),
        ((50, 64 * 50), 2500, 64),
        ((64, 63), 63, 64),  # not a multiple of 8
    ],
)
def test_view(shape, k, n):
    view = make_layout(shape).view
    assert (view.batch, view.k, view.n) == (1, k, n)
    assert view.size == np.prod(shape, dtype=np.int64)


@pytest.mark.parametrize(
    ("options", "batch", "k", "n"),
    [
        ({}, 1, 8 * 64, 128),
        ({"row_axes": 1}, 1, 1024, 64),  # 8 rows: half of a step would be padding
        ({"row_axes": 1, "along_columns": True}, 1, 1024, 64),  # flat as well
        ({"batch_axes": 1}, 8, 64, 128),
        ({"batch_axes": 1, "along_columns": True}, 8, 128, 64),
        ({"along_columns": True}, 1, 128, 8 * 64),
        ({"row_axes": 0}, 1, 1024, 64),  # no rows: flat
        ({"row_axes": 3, "along_columns": True}, 1, 1024, 64),  # no columns
    ],
)
def test_view_of_a_matrix(options, batch, k, n):
    view = make_layout((8, 64, 128), **options).view
    assert (view.batch, view.k, view.n) == (batch, k, n)
    is_flat = k == 1024
    assert view.along_columns == (options.get("along_columns", False) and not is_flat)


LAYOUTS = [
    *(make_layout(shape) for shape in [(), (0,), (5,), (3, 2**33, 7), (1,) * 8]),
    Layout((4, 6, 64), 1, 1, True, steps=2, code_bits=9, parts=(2, 3, 1)),
    Layout((2**20, 2**34), 0, 1, steps=4, code_bits=11, parts=(2**15, 2**15)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_header_round_trip(layout):
    assert _layout.unpack_header(_layout.pack_header(layout)) == layout
    assert Layout.from_json(layout.to_json()) == layout


def test_layout_errors():
    with pytest.raises(ValueError, match="at most 8 dimensions"):
        make_layout((1,) * 9)
    for options in ({"batch_axes": 3}, {"row_axes": 3}, {"batch_axes": 1, "row_axes": 2}):
        with pytest.raises(ValueError, match=r"slices of shape \(4, 4\) do not have"):
            make_layout((4, 4), **options)


def test_header_errors():
    header = _layout.pack_header(make_layout((4, 4)))
    with pytest.raises(ValueError, match="28 uint32 words"):
        _layout.unpack_header(header[1:])
    newer = header.copy()
    newer[0] = 3
    with pytest.raises(ValueError, match="format version 3 is unknown"):
        _layout.unpack_header(newer)
    # Every bit of what is not the codebook's id counts.
    for word in range(1, 24):
        for bit in range(32):
            corrupt = header.copy()
            corrupt[word] ^= np.uint32(1 << bit)
            with pytest.raises(ValueError, match="corrupt"):
                _layout.unpack_header(corrupt)
