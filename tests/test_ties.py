"""Tied leaves, one array at several paths, are compressed, decoded and counted once."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
from df11_jax import compress_params, decompress_params, size_report
from df11_jax._compress import align_layers
from df11_jax._identity import identity
from df11_jax._units import format_bytes
from df11_jax.nnx import CompressedParam, compress

SHAPE = (4, 128, 128)
NBYTES = 2 * 4 * 128 * 128

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes of the CPU backend"
)


def host():
    return np.array(random_weights(SHAPE))


def spread():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    return jax.device_put(host(), NamedSharding(mesh, PartitionSpec(None, "x")))


def twice(array):
    return array, array


# Makes two leaves that are one.
TIED = {
    "numpy": lambda: twice(host()),
    "numpy views": lambda: (lambda array: (array[:], array.reshape(-1).reshape(SHAPE)))(host()),
    "a part": lambda: (lambda array: (array[1:], array[1:]))(host()),
    "jax": lambda: twice(random_weights(SHAPE)),
    "placed": lambda: jax.device_put(twice(random_weights(SHAPE)), jax.devices()[0]),
    "spread": lambda: twice(spread()),
    "compressed": lambda: twice(df11_jax.compress(host())),
    "mapped": lambda: jax.tree.map(lambda x: x, twice(df11_jax.compress(host()))),
}
# Makes two leaves that are not, however alike.
APART = {
    "numpy": lambda: (host(), host()),
    "jax": lambda: (random_weights(SHAPE), random_weights(SHAPE)),
    "computed": lambda: jax.jit(lambda pair: pair)(twice(random_weights(SHAPE))),
    "parts": lambda: (lambda array: (array[1:], array[:-1]))(host()),
    "shapes": lambda: (lambda array: (array, array.reshape(-1)))(host()),
    "transposed": lambda: (lambda array: (array, array.transpose(0, 2, 1)))(host()),
    "types": lambda: (lambda array: (array, array.view(np.float16)))(host()),
    "devices": lambda: [jax.device_put(host(), device) for device in jax.devices()[:2]],
    "compressed": lambda: (df11_jax.compress(host()), df11_jax.compress(host())),
    "descriptions": lambda: twice(jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)),
    "numbers": lambda: (1.5, 1.5),
}


@pytest.mark.parametrize("name", TIED)
def test_one_array(name):
    first, second = TIED[name]()
    assert identity(first) == identity(second)
    report = size_report({"first": first, "second": second})
    alone = size_report({"first": first})
    assert (report.nbytes, report.nbytes_before) == (alone.nbytes, alone.nbytes_before)
    assert report.bits_per_weight == alone.bits_per_weight
    assert [leaf.tied_to for leaf in report.leaves] == [None, "first"]
    assert report.leaves[1].nbytes == report.leaves[0].nbytes
    assert str(report).splitlines()[3].split()[-4:] == ["tied", "tied", "(is", "first)"]


@pytest.mark.parametrize("name", APART)
def test_two_arrays(name):
    if name == "devices" and len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    first, second = APART[name]()
    assert identity(first) != identity(second)
    report = size_report([first, second])
    assert report.nbytes == size_report([first]).nbytes + size_report([second]).nbytes
    assert [leaf.tied_to for leaf in report.leaves] == [None, None]


def test_plot_has_one_pair_of_bars():
    import matplotlib

    matplotlib.use("agg")
    axes = size_report(twice(host())).plot()
    assert len(axes.patches) == 2


@pytest.mark.parametrize("name", [name for name in TIED if name not in ("compressed", "mapped")])
def test_compressed_once(name, capsys, monkeypatch):
    monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
    embedding, head = TIED[name]()
    params = {"embedding": embedding, "head": [head, np.ones(3)]}
    small = compress_params(params, progress=True)
    assert small["embedding"] is small["head"][0]
    assert size_report(small).nbytes < 0.7 * size_report(params).nbytes
    size = format_bytes(embedding.nbytes)
    assert f"100%, {size} of {size}" in capsys.readouterr().err
    assert_same_bits(df11_jax.decompress(small["embedding"]), np.asarray(head))


def test_left_out_at_one_path():
    weights = host()
    for options in (
        {"include": "embedding"},
        {"predicate": lambda path, leaf: path == "embedding"},
    ):
        small = compress_params({"embedding": weights, "head": weights}, **options)
        assert small["head"] is weights
        assert_same_bits(df11_jax.decompress(small["embedding"]), weights)
        assert size_report(small).nbytes_before == 2 * NBYTES


def test_stacked_at_one_path():
    weights = host()
    paths = {"layers": weights, "again": {"layers": weights}, "flat": weights, "also": weights}
    small = compress_params(paths, stacked="layers")
    assert small["layers"] is small["again"]["layers"]
    assert small["flat"] is small["also"]
    assert (small["layers"].stack_shape, small["flat"].stack_shape) == ((4,), ())


def test_what_would_not_get_smaller_stays_one():
    bits = np.random.default_rng(0).integers(0, 1 << 16, SHAPE, np.uint16).view(jnp.bfloat16)
    small = compress_params(twice(bits))
    assert small[0] is bits and small[1] is bits


def lengths():
    """Compressed tensors of one shape, each with more words of exponents than the last."""
    random = np.random.default_rng(0)
    spreads = [np.exp(spread * random.standard_normal(SHAPE)) for spread in (0, 1, 2)]
    arrays = [df11_jax.compress(jnp.asarray(host() * spread, jnp.bfloat16)) for spread in spreads]
    words = [array.exponents.shape[-1] for array in arrays]
    assert words == sorted(set(words))
    return arrays


def test_layers_stay_tied():
    short, middle, long = lengths()
    named = [
        ("layers/0/a", short),
        ("layers/1/a", middle),
        ("layers/0/b", short),  # so that a and b are of one length
        ("layers/1/b", long),
        ("layers/2/b", short),
        ("head", short),
        ("other", middle),
        ("plain", np.ones(3)),
    ]
    paths, aligned = (list(column) for column in zip(*named, strict=True))
    align_layers(paths, aligned)
    assert aligned[0] is aligned[2] is aligned[4] is aligned[5]
    assert aligned[1] is aligned[6]
    assert aligned[7] is named[7][1]
    assert len({array.exponents.shape for array in aligned[:7]}) == 1
    for array, (_, before) in zip(aligned[:7], named, strict=False):
        assert_same_bits(df11_jax.decompress(array), df11_jax.decompress(before))


def test_work_grows_as_the_leaves_do():
    """Not as their squares: a mixture of experts that is not stacked has tens of thousands."""
    small = df11_jax.compress(host())

    def calls(count):
        leaves = [jax.tree.map(np.array, small) for _ in range(count)]
        made = 0

        def trace(frame, event, argument):
            nonlocal made
            made += event.endswith("call")

        sys.setprofile(trace)
        try:
            align_layers([f"experts/{i}" for i in range(count)], leaves)
        finally:
            sys.setprofile(None)
        return made

    assert calls(400) < 4.5 * calls(100)


def test_layers_of_other_kinds_keep_their_length():
    short, middle, long = lengths()
    aligned = [short, middle, long]
    align_layers(["a/0", "a/1", "b/0"], aligned)
    assert aligned[0].exponents.shape == aligned[1].exponents.shape == middle.exponents.shape
    assert aligned[2] is long


@on_cpu
def test_decoded_once():
    small = compress_params({"embedding": (array := host()), "head": array})
    small["apart"] = df11_jax.compress(host())
    weights = decompress_params(small)
    assert weights["embedding"] is weights["head"]
    assert weights["apart"] is not weights["head"]
    for leaf in weights.values():
        assert_same_bits(leaf, array)
    assert count_decodes(decompress_params, small) == 2
    # As arguments of a program, they are not tied.
    assert count_decodes(jax.jit(decompress_params), small) == 3


def test_nnx_parameters_that_hold_one_array():
    class Model(nnx.Module):
        def __init__(self, weights):
            self.embedding = nnx.Param(weights)
            self.layers = nnx.List([nnx.Param(weights), nnx.Param(weights), nnx.Param(weights + 0)])
            self.head = nnx.Param(weights)
            self.adapter = nnx.LoRAParam(weights)

    weights = random_weights(SHAPE)
    model = Model(weights)
    compress(model, stacked="layers", include="embedding|layers")
    first, second, apart = (layer.get_raw_value() for layer in model.layers)
    assert first is second and first.stack_shape == (4,)
    assert identity(apart) != identity(first)
    assert model.embedding.get_raw_value().stack_shape == ()
    assert model.head.get_raw_value() is weights and model.adapter.get_raw_value() is weights
    for param in (model.embedding, *model.layers):
        assert isinstance(param, CompressedParam)
        assert_same_bits(param.get_value(), weights)
