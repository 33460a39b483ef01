"""What a layout says of a tensor: matrices, parts, codebooks, and the lengths of its arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mostly_slow import mostly_slow
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
from df11_jax import _ffi, _host_codec, _layout
from df11_jax._compress_tensor import compress_as
from df11_jax._layout import make_layout
from df11_jax._slices import decode_slices

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")

MATRICES = [
    {"along_columns": True},
    {"row_axes": 1},
    {"row_axes": 1, "along_columns": True},
    {"batch_axes": 1},
    {"batch_axes": 1, "along_columns": True},
    {"batch_axes": 1, "row_axes": 0},
    {"row_axes": 3, "along_columns": True},
]


@pytest.mark.parametrize("shape", [(4, 96, 128), (3, 70, 200), (16, 128, 64)])
@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_any_matrix(matrix, shape):
    weights = random_weights((2, *shape))
    a = df11_jax.compress(weights, stack_axes=1, **matrix)
    assert (a.shape, a.slice_shape) == (weights.shape, shape)
    assert _layout.unpack_header(np.asarray(a.header[1])) == a.layout
    for field, value in matrix.items():
        assert getattr(a.layout, field) == value
    assert_same_bits(df11_jax.decompress(a), weights)
    assert_same_bits(_host_codec.decode(list(map(np.asarray, a.payload)), a.layout, "a"), weights)


def test_along_columns_is_the_transpose_lane_for_lane():
    weights = random_weights((192, 256))
    a = df11_jax.compress(weights, along_columns=True)
    transposed = df11_jax.compress(weights.T)
    for name in _layout.PAYLOAD[1:]:
        np.testing.assert_array_equal(getattr(a, name), getattr(transposed, name))


@pytest.mark.parametrize("options", [{"batch_axes": 3}, {"row_axes": 3}, {"row_axes": -1}])
def test_axes_that_there_are_not(options):
    with pytest.raises(ValueError, match=r"^array: slices of shape \(64, 64\) do not have"):
        df11_jax.compress(random_weights((64, 64)), **options)


@pytest.mark.parametrize("parts", [(0, 1), (-1, 1), (7, 1), (0x10000, 1)])
def test_parts_that_there_cannot_be(parts):
    with pytest.raises(ValueError, match="cannot be divided into"):
        make_layout((6 * 0x10000, 10), parts=parts)


# Slices by index.


@pytest.fixture(scope="module")
def stacks():
    plain = [random_weights((5, 96, 64), 1), random_weights((5, 40, 128), 2)]
    return plain, [df11_jax.compress(weights, stack_axes=1) for weights in plain]


@pytest.mark.parametrize("index", [[3, -1, 0], [[-1, 4], [2, -1]], [-1], -1, [-2, -1, 9]])
def test_no_slice(stacks, index):
    plain, small = stacks
    index = np.array(index)
    decode = jax.jit(lambda index: decode_slices(small, index))
    for weights, decoded in zip(plain, decode(index), strict=True):
        assert decoded.shape == index.shape + weights.shape[1:]
        wanted = index != -1
        expected = weights[np.clip(index[wanted], 0, 4)]
        assert_same_bits(np.asarray(decoded)[wanted], expected)


@on_cpu
def test_nothing_is_decoded_for_no_slice(stacks):
    _, small = stacks
    decode = jax.jit(lambda index: decode_slices(small, index))
    for index, count in (([-1, 2, -1], 2), ([-1, -1, -1], 0), ([0, 1, 1], 6)):
        assert count_decodes(decode, np.array(index)) == count


def test_no_slice_of_what_is_corrupt(stacks):
    plain, small = stacks
    corrupt = dataclasses.replace(small[0], exponents=small[0].exponents.at[0, :100].set(0))
    (decoded,) = decode_slices([corrupt], np.array([-1, 1]))
    assert_same_bits(decoded[1], plain[0][1])
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="DATA_LOSS"):
        jax.block_until_ready(decode_slices([corrupt], np.array([0, 1])))


# Divided slices.


def compress_divided(weights, stack_axes, parts, **matrix):
    layout = make_layout(weights.shape[stack_axes:], **matrix)
    return compress_as(weights, dataclasses.replace(layout, parts=parts), "weights")


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
@pytest.mark.parametrize("parts", [(2, 2), (1, 4), (3, 1)])
@pytest.mark.parametrize("along_columns", mostly_slow([True, False]))
def test_divided(stack, parts, along_columns):
    weights = random_weights((*stack, 192, 256))
    a = compress_divided(weights, len(stack), parts, along_columns=along_columns)
    assert (a.shape, a.stack_shape) == (weights.shape, stack)
    assert a.layout.part_shape == (192 // parts[0], 256 // parts[1])
    assert all(leaf.shape[:-1] == (*stack, *parts) for leaf in a.payload)
    header = np.asarray(a.header).reshape(-1, _layout.HEADER_WORDS)[-1]
    assert _layout.unpack_header(header) == a.layout
    assert_same_bits(df11_jax.decompress(a), weights)
    assert_same_bits(_host_codec.decode(list(map(np.asarray, a.payload)), a.layout, "a"), weights)
    # Each part is compressed as if there were no others.
    rows, cols = a.layout.part_shape
    undivided = dataclasses.replace(a.layout, shape=a.layout.part_shape, parts=())
    for i, j in np.ndindex(*parts):
        corner = weights[..., i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        alone = compress_as(corner, undivided, "part")
        payload = [leaf[..., i, j, :] for leaf in a.payload]
        for name, one, other in zip(_layout.PAYLOAD, alone.payload, payload, strict=True):
            common = min(one.shape[-1], other.shape[-1])
            if name != "header":
                np.testing.assert_array_equal(one[..., :common], other[..., :common])
        payload[0] = alone.header
        part = df11_jax.DF11Array.from_payload(payload, undivided)
        assert_same_bits(df11_jax.decompress(part), corner)


def test_slices_of_a_divided_stack():
    weights = random_weights((4, 96, 128))
    divided = compress_divided(weights, 1, (3, 2))
    whole = df11_jax.compress(weights, stack_axes=1)
    index = jnp.array([2, -1, 0, 9])
    names = ["divided", "whole"]
    for decoded in jax.jit(lambda i: decode_slices([divided, whole], i, names=names))(index):
        assert_same_bits(decoded[0], weights[2])
        assert_same_bits(decoded[2:], weights[jnp.array([0, 3])])


@on_cpu
def test_no_part_of_no_slice():
    divided = compress_divided(random_weights((4, 96, 128)), 1, (3, 2))
    assert count_decodes(lambda: decode_slices([divided], jnp.array([-1, 2]))) == 6


def test_a_part_decodes_where_it_is():
    """Each device holds its part, by the sharding of the plain tensor."""
    weights = random_weights((96, 256))
    divided = compress_divided(weights, 0, (2, 2))
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("x", "y")
    placed = jax.device_put(divided, jax.NamedSharding(mesh, spec))
    undivided = dataclasses.replace(divided.layout, shape=divided.layout.part_shape, parts=())

    def decode(part):
        headers = jnp.asarray(_layout.pack_header(undivided))
        payload = [leaf[0, 0] for leaf in part.payload]
        payload[0] = payload[0].at[: _layout.CODEBOOK_ID].set(headers[: _layout.CODEBOOK_ID])
        return df11_jax.decompress(df11_jax.DF11Array.from_payload(payload, undivided))

    here = jax.shard_map(decode, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_same_bits(jax.jit(here)(placed), weights)


# Bands, 64 rows of a matrix with pairs along columns.


@pytest.mark.parametrize("shape", mostly_slow([[2, 3, 250, 144], [2, 192, 208], [2, 1000, 64]]))
@pytest.mark.parametrize("decoder", ["compiled", "in XLA operations"])
def test_bands_by_index(shape, decoder, monkeypatch):
    if decoder != "compiled":
        monkeypatch.setattr(_ffi, "platforms", lambda target: ())
    weights = (
        random_weights(tuple(shape)).at[1, ..., 70, :].set(3e-38)
    )  # others have no such exponents
    a = df11_jax.compress(weights, stack_axes=1, batch_axes=len(shape) - 3, along_columns=True)
    matrices = weights.reshape(-1, *shape[-2:])
    missing = -shape[-2] % 64
    rows = jnp.pad(matrices, ((0, 0), (0, missing), (0, 0))).reshape(-1, 64, shape[-1])

    def check(got, index):
        assert got.shape == (*index.shape, 64, shape[-1])
        for band, i in zip(got.reshape(-1, *got.shape[-2:]), index.reshape(-1), strict=True):
            i = min(i, len(rows) - 1)
            is_last = missing and (i + 1) % (len(rows) // len(matrices)) == 0
            if i >= 0:
                end = 64 - missing if is_last else 64
                assert_same_bits(band[:end], rows[i, :end])

    def decode(a, index):
        return decode_slices([a], index, bands=True)[0]

    last = len(rows) - 1
    index = np.array([[4, -1, 0], [last, 10 * last, last // 2]])
    check(jax.jit(decode)(a, jnp.asarray(index)), index)
    check(jax.vmap(decode, (None, 0))(a, jnp.asarray(index[1])), np.minimum(index[1], last))
    own = jax.vmap(decode)(a, jnp.array([1, 2]))  # of each slice
    check(own, np.array([1, 2 + len(rows) // 2]))


@on_cpu
def test_no_band_but_those_of_the_index():
    a = df11_jax.compress(random_weights((384, 128)), along_columns=True)
    assert count_decodes(lambda: decode_slices([a], jnp.array([-1, 2, 5]), bands=True)) == 2


@on_cpu
def test_a_corrupt_band_does_not_spoil_others():
    a = df11_jax.compress(random_weights((256, 256)), along_columns=True)
    # Of two tiles below each other, the lower one of band 3.
    words = a.sign_mantissa.at[-1].add(1 << 9)
    bad = dataclasses.replace(a, sign_mantissa=words)
    decode_slices([bad], jnp.array([0, 2]), bands=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="'table' is corrupt: chunk 7 of slice 0"):
        jax.block_until_ready(decode_slices([bad], jnp.array([3]), names=["table"], bands=True))


@pytest.mark.parametrize("options", [{}, {"along_columns": True}], ids=str)
def test_bands_that_there_are_not(options):
    # Along rows; flat; divided.
    shape = (70, 200) if options else (128, 128)
    divided = compress_divided(random_weights((128, 64)), 0, (2, 1), along_columns=True)
    for a in (df11_jax.compress(random_weights(shape), **options), divided):
        with pytest.raises(ValueError, match="tensor 0: rows of slices with Layout"):
            decode_slices([a], 0, bands=True)


# Codebooks.


def test_one_codebook_for_all_slices():
    weights = np.asarray(random_weights((4, 128, 64)))
    weights = weights * np.array([1, 30, 0.01, 1], weights.dtype)[:, None, None]
    layout = make_layout((128, 64))
    ids = slice(_layout.CODEBOOK_ID, _layout.CODEBOOK_ID + 2)
    own = _host_codec.encode(weights, "w", layout)
    shared = _host_codec.encode(weights, "w", layout, share_codebook=True)
    assert (shared[1] == shared[1][0]).all() and (shared[0] == shared[0][0]).all()
    assert len({tuple(row) for row in own[1]}) == len({tuple(row[ids]) for row in own[0]}) == 4
    for payload in (own, shared):
        assert_same_bits(_host_codec.decode(payload, layout, "w"), weights)
    # FNV-1a over the bytes of the codebook.
    value = 0xCBF29CE484222325
    for byte in own[1][0].tobytes():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    assert own[0][0, ids].tolist() == [value % 2**32, value >> 32]


def test_equal_codebooks_have_equal_ids():
    weights = np.asarray(random_weights((128, 64)))
    payload = _host_codec.encode(
        np.stack([weights, -weights, 2 * weights]), "w", make_layout((128, 64))
    )
    ids = payload[0][:, _layout.CODEBOOK_ID :]
    assert (payload[1][0] == payload[1][1]).all() and (ids[0] == ids[1]).all()
    assert (payload[1][0] != payload[1][2]).any() and (ids[0] != ids[2]).any()


# The length of `exponents`.


@pytest.mark.parametrize("shape", [(512, 512), (1024, 1024), (2048, 1376)])
def test_normal_weights_of_any_scale_have_equal_lengths(shape):
    layout = make_layout(shape)
    lengths = {
        _host_codec.encode(
            np.asarray(random_weights(shape, seed, scale)), "w", layout, verify=False
        )[3].shape
        for seed, scale in enumerate((0.02, 0.02, 1e-3, 30.0))
    }
    assert len(lengths) == 1
    ((words,),) = lengths
    thirds = 8 * layout.view.sign_mantissa_words + layout.view.size
    first = {8: 2634, 4: 2675, 2: 2757}[layout.steps] % 40
    series = [4 * -(-(first + 40 * i) * thirds // 384_000) for i in range(400)]
    assert words in series


def test_layers_one_by_one_compile_one_program():
    scales = (0.02, 1e-3, 30.0, 0.5)
    layers = [df11_jax.compress(random_weights((256, 256), i, s)) for i, s in enumerate(scales)]
    # A function of its own: all `jit`s of one function share a cache.
    decompress = jax.jit(lambda a: df11_jax.decompress(a))
    for layer in layers:
        decompress(layer)
    assert decompress._cache_size() == 1


def uneven_layers():
    """Layers of which one has exponents of another length, and a leaf of another name."""
    layers = [{"kernel": np.array(random_weights((256, 128), i))} for i in range(3)]
    layers[1]["kernel"][:128] = 1
    return {"layers": layers, "head": np.ones((256, 128), layers[0]["kernel"].dtype)}


def test_layers_of_a_tree_have_equal_shapes():
    params = uneven_layers()
    alone = [df11_jax.compress(layer["kernel"]) for layer in params["layers"]]
    longest = max(a.exponents.shape for a in alone)
    assert alone[1].exponents.shape < longest
    small = df11_jax.compress_params(params)
    shapes = [[leaf.shape for leaf in layer["kernel"].payload] for layer in small["layers"]]
    assert shapes[0] == shapes[1] == shapes[2]
    assert small["layers"][1]["kernel"].exponents.shape == longest
    assert small["head"].exponents.shape < longest
    jax.tree.map(assert_same_bits, df11_jax.decompress_params(small), params)


def test_layers_are_made_equal_where_transfers_are_forbidden():
    params = uneven_layers()
    with jax.transfer_guard("disallow"):  # unless they are explicit
        small = df11_jax.compress_params(params)
        stacked = df11_jax.stack([small["layers"][1]["kernel"], small["head"]])
    assert len({layer["kernel"].exponents.shape for layer in small["layers"]}) == 1
    assert small["head"].exponents.shape < stacked.exponents.shape[1:]


def test_layers_that_were_compressed_before_are_among_them():
    layers = [layer["kernel"] for layer in uneven_layers()["layers"]]
    small = df11_jax.compress_params([df11_jax.compress(layers[1]), *layers])
    assert len({a.exponents.shape for a in small}) == 1
    for a, weights in zip(small, [layers[1], *layers], strict=True):
        assert_same_bits(df11_jax.decompress(a), weights)
