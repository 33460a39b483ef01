"""Stable shapes: what is compiled for one checkpoint takes another one of the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from payloads import assert_same_bits, random_weights

from df11_jax import DF11Array, compress, compress_params, decompress
from df11_jax._compress_tensor import compress_as
from df11_jax._layout import PAYLOAD, make_layout
from df11_jax._stack import fit_exponents

SHAPE = (4, 256, 256)


def shapes(tree):
    """All that a program is compiled for, but for shardings."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def lengthened(tree, words):
    def lengthen(leaf):
        if isinstance(leaf, DF11Array):
            return fit_exponents(leaf, leaf.exponents.shape[-1] + words)
        return leaf

    return jax.tree.map(lengthen, tree, is_leaf=lambda leaf: isinstance(leaf, DF11Array))


def used_words(a):
    return -(-int(np.max(a.chunk_offsets)) // 4) * 4


def rough(shape):
    """Weights that compress worse than normal ones, and still do."""
    spread = np.exp(np.random.default_rng(0).standard_normal(shape))
    return jnp.asarray(spread * random_weights(shape, 1), jnp.bfloat16)


LAYOUTS = {
    "rows": make_layout(SHAPE[1:]),
    "columns": make_layout(SHAPE[1:], along_columns=True),
    "batch axis": make_layout(SHAPE, batch_axes=1),
    "row axis": make_layout(SHAPE, row_axes=1),
    "short codes": dataclasses.replace(make_layout(SHAPE[1:]), code_bits=10),
    "short chunks": dataclasses.replace(make_layout(SHAPE[1:]), steps=2),
    "parts": dataclasses.replace(make_layout(SHAPE[1:]), parts=(2, 1)),
}


class TestOneTensor:
    @pytest.mark.parametrize("extra", [-1, 0, 400], ids=["tight", "as it is", "long"])
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_it_gets_the_arrays_of_the_other(self, layout, extra):
        first, second = random_weights(SHAPE), random_weights(SHAPE, 1, 0.05)
        like = compress_as(first, layout, "w")
        # Not of the writer's series: room for the worse of both, or more than anyone needs.
        least = max(used_words(like), used_words(compress_as(second, layout, "w")))
        words = least if extra < 0 else like.exponents.shape[-1] + extra
        like = fit_exponents(like, words)
        assert_same_bits(decompress(like), first)
        for other in (like, jax.eval_shape(lambda: like)):
            a = compress(second, like=other)
            assert a.layout == layout and shapes(a) == shapes(like)
            assert_same_bits(decompress(a), second)

    def test_it_stays_where_its_weights_are(self):
        device = jax.devices()[-1]
        weights = random_weights((256, 256))
        a = compress(jax.device_put(weights, device), like=compress(weights))
        assert a.exponents.devices() == {device}

    def test_it_does_not_fit(self):
        like = compress(random_weights((256, 256)))
        words = like.exponents.shape[-1]
        with pytest.raises(ValueError, match=f"array: does not fit .* {words:,}.*without like"):
            compress(rough((256, 256)), like=like)

    def test_it_is_another_tensor(self):
        weights = random_weights((256, 256))
        like = compress(weights)
        with pytest.raises(ValueError, match=r"array: expected .*256, 256.*got bfloat16\[256, 1"):
            compress(weights[:, :128], like=like)
        with pytest.raises(TypeError, match="array: expected bfloat16, got float32"):
            compress(weights.astype(jnp.float32), like=like)
        with pytest.raises(TypeError, match="array: is compressed already"):
            compress(like, like=like)
        with pytest.raises(TypeError, match="like: expected a DF11Array"):
            compress(weights, like=weights)
        with pytest.raises(ValueError, match=r"like says .* leave out stack_axes"):
            compress(weights, like=like, row_axes=1)


class TestTrees:
    def params(self, seed=0, scale=0.02):
        embedding = random_weights((500, 256), seed, scale)
        return {
            "embedding": embedding,
            "head": embedding,
            "layers": random_weights(SHAPE, seed + 1, scale),
            "norm": random_weights((256,), seed, scale),
            "small": random_weights((8, 64), seed, scale),
            "step": np.int32(seed),
        }

    def small(self):
        small = compress_params(self.params(), stacked="layers")
        # One that nobody would compress: it takes more memory than it saves.
        small["small"] = lengthened(compress(self.params()["small"]), 40)
        assert small["small"].compressed_nbytes > small["small"].nbytes
        return small

    def test_all_leaves(self):
        small, params = self.small(), self.params(7, 0.05)
        other = compress_params(params, like=small)
        assert shapes(other) == shapes(small)
        assert shapes(compress_params(params, like=jax.eval_shape(lambda: small))) == shapes(small)
        assert other["head"] is other["embedding"]
        assert other["norm"] is params["norm"] and other["step"] is params["step"]
        for name in ("embedding", "layers", "small"):
            assert_same_bits(decompress(other[name]), params[name])

    def test_numbers_and_arrays_of_64_bits(self):
        params = self.params() | {"step": 3, "rate": 0.5, "table": np.arange(4), "mean": np.ones(3)}
        like = jax.eval_shape(lambda: compress_params(params))
        other = compress_params(params, like=like)
        assert shapes(jax.tree.map(jnp.asarray, other)) == shapes(like)
        assert other["table"] is params["table"] and other["rate"] is params["rate"]

    def test_leaves_that_are_compressed_already(self):
        small = self.small()
        long = lengthened(small, 4)
        long["head"] = long["embedding"]
        for params, like in ((small, long), (long, small)):
            other = compress_params(params, like=like)
            assert shapes(other) == shapes(like) and other["head"] is other["embedding"]
            for name in ("embedding", "layers", "small"):
                assert_same_bits(decompress(other[name]), self.params()[name])

    def test_rounded_to_bfloat16(self):
        small = self.small()
        wide = {name: np.float32(leaf) for name, leaf in self.params().items() if name != "step"}
        wide |= {"norm": self.params()["norm"], "step": np.int32(1)}
        assert shapes(compress_params(wide, like=small, cast=True)) == shapes(small)
        with pytest.raises(ValueError, match=r"embedding: .*float32.*cast=True"):
            compress_params(wide, like=small)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"norm": np.ones(3, jnp.bfloat16)}, r"norm: expected bfloat16\[256\].*bfloat16\[3\]"),
            ({"norm": np.ones(256, np.float32)}, r"norm: .*got float32\[256\]: cast it first"),
            ({"norm": compress(random_weights((256,)))}, r"norm: .*compressed.*decompress it"),
            ({"step": 3}, r"step: expected int32\[\], as in like, got 3: cast it first"),
            ({"step": 2**40}, r"step: expected int32\[\], as in like, got 1099511627776: cast"),
            (
                {"step": np.array("text")},
                r"step: expected int32\[\], as in like, got <U4\[\]: cast",
            ),
            ({"layers": random_weights(SHAPE[1:])}, r"layers: expected .*\[4, 256, 256\], stack"),
            ({"layers": compress(random_weights(SHAPE))}, r"layers: .* stacked along 0: decompr"),
            (
                {"layers": compress(random_weights(SHAPE), stack_axes=1, along_columns=True)},
                r"layers: .*along_columns=False.*along_columns=True.*decompress it",
            ),
            ({"layers": rough(SHAPE)}, r"layers: does not fit into the shapes of like"),
            ({"layers": compress(rough(SHAPE), stack_axes=1)}, "layers: does not fit"),
            ({"layers": "text"}, r"layers: expected compressed.* got 'text'"),
            (
                {"layers": jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)},
                r"layers: .*pass the weights themselves",
            ),
            ({"more": np.ones(3)}, "more: is in params and not in like"),
            ({"norm": {"scale": np.ones(3)}}, "norm: is in like and not in params"),
        ],
    )
    def test_what_is_not_like(self, changes, message):
        with pytest.raises(ValueError, match=message):
            compress_params(self.params(1) | changes, like=self.small())

    def test_other_containers(self):
        weights = random_weights((256, 256))
        with pytest.raises(ValueError, match="params has other containers than like"):
            compress_params([weights], like=(compress(weights),))

    @pytest.mark.parametrize("option", [{"include": "a"}, {"stacked": "a"}, {"min_size": 1}])
    def test_two_say_what_is_compressed(self, option):
        with pytest.raises(ValueError, match=r"like says which .*leave out include, stacked"):
            compress_params(self.params(), like=self.small(), **option)


def checkpoint(seed, scale):
    """A model of 24 layers that are kept one by one, with weights of different scales in them."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        values = scale * 2 ** rng.uniform(-1, 1) * rng.standard_normal(shape, np.float32)
        return values.astype(jnp.bfloat16)

    return [{"up": normal(256, 512), "down": normal(512, 256)} for _ in range(24)]


def fine_tune(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: (w * (1 + 0.05 * rng.standard_normal(w.shape, np.float32))).astype(w.dtype),
        params,
    )


BASE = checkpoint(0, 0.02)
OTHERS = {
    "another seed": checkpoint(1, 0.02),
    "another scale": checkpoint(2, 0.05),
    "fine-tune": fine_tune(BASE),
}


def sums(layer):
    return {name: jnp.sum(decompress(a), dtype=jnp.float32) for name, a in layer.items()}


class TestCompilations:
    def test_one_program_for_all_layers(self):
        uneven = [layer | {"up": np.ones_like(layer["up"])} for layer in BASE[:1]] + BASE[1:]
        assert compress(uneven[0]["up"]).exponents.shape < compress(BASE[0]["up"]).exponents.shape
        # A function of its own: all `jit`s of one function share a cache.
        program = jax.jit(lambda layer: sums(layer))
        for layer in compress_params(uneven):
            program(layer)
        assert program._cache_size() == 1

    def test_another_checkpoint(self):
        # Without `like`, too: lengths are those of a series, whose steps normal weights are amid.
        program = jax.jit(lambda layer: sums(layer))
        for params in (BASE, *OTHERS.values()):
            for layer in params:
                program({name: compress(w, verify=False) for name, w in layer.items()})
        assert program._cache_size() == 1

    @pytest.mark.parametrize("params", OTHERS.values(), ids=OTHERS)
    def test_another_checkpoint_like_the_first(self, params):
        # Of lengths that no other checkpoint would have by itself.
        small = lengthened(compress_params(BASE), 4)
        program = jax.jit(lambda params: [sums(layer) for layer in params])
        program(small)
        ahead = jax.jit(lambda params: [sums(layer) for layer in params]).lower(small).compile()
        other = compress_params(params, like=small)
        expected = jax.jit(lambda layers: [
            {name: jnp.sum(w, dtype=jnp.float32) for name, w in layer.items()} for layer in layers
        ])(params)  # fmt: skip
        assert program(other) == expected
        assert program._cache_size() == 1
        assert ahead(other) == expected


MESH = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
PLACES = {
    "device": jax.devices()[-1],
    "host memory": jax.sharding.SingleDeviceSharding(jax.devices()[-1], "pinned_host"),
    "divided": jax.NamedSharding(MESH, jax.P("x")),
    "divided in host memory": jax.NamedSharding(MESH, jax.P("x"), memory_kind="pinned_host"),
}


class TestLengths:
    """A tensor whose exponents get another length stays where it is."""

    @pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
    @pytest.mark.parametrize("extra", [8, -8])
    def test_placed(self, place, extra):
        weights = random_weights(SHAPE)
        a = jax.device_put(compress(weights, stack_axes=1), place)
        fitted = fit_exponents(a, a.exponents.shape[-1] + extra)
        assert fitted.exponents.shape[-1] == a.exponents.shape[-1] + extra
        assert fitted.exponents.sharding == a.exponents.sharding
        # A device alone would leave them in the host's memory.
        first = jax.devices()[0]
        near = jax.sharding.SingleDeviceSharding(first, memory_kind=first.default_memory().kind)
        assert_same_bits(decompress(jax.device_put(fitted, near)), weights)

    def test_on_the_host(self):
        weights = random_weights(SHAPE)
        a = jax.tree.map(np.asarray, compress(weights, stack_axes=1))
        fitted = fit_exponents(a, a.exponents.shape[-1] + 8)
        assert [type(array) for array in fitted.payload] == len(PAYLOAD) * [np.ndarray]
        assert_same_bits(decompress(fitted), weights)

    def test_uncommitted_ones_stay_so(self):
        a = compress(random_weights((256, 256)))
        assert not fit_exponents(a, a.exponents.shape[-1] + 8).exponents.committed
