"""Stacks whose layers are along another axis than the first, as MaxText and T5X make them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_models import SCAN, TOKENS, Compact, Embed, Stack, init
from payloads import assert_same_bits, random_weights

import df11_jax
import df11_jax.linen
import df11_jax.nnx
from df11_jax import DF11Array, compress_params, decompress_params, scan_blocks

LAYERS = 4


def params():
    """Layers along axis 1; weights that are compressed, and others."""
    return {
        "decoder": {
            "layers": {
                "up": random_weights((128, LAYERS, 256), 1),
                "out": np.asarray(random_weights((2, LAYERS, 64, 128), 2)),
                "norm": jnp.ones((128, LAYERS), jnp.bfloat16),
                "router": np.arange(128 * LAYERS * 3, dtype=np.float32).reshape(128, LAYERS, 3),
                "keys": jax.random.split(jax.random.key(0), (3, LAYERS)),
                "name": "layers",
            }
        },
        "embedding": random_weights((500, 64)),
        "step": 3,
    }


def in_front(tree):
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tree)


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_axis_comes_to_the_front_of_all_leaves():
    plain = params()
    small = compress_params(plain, stacked="layers/", stack_axis=1)
    layers, before = small["decoder"]["layers"], plain["decoder"]["layers"]
    for name in ("up", "out"):
        assert isinstance(layers[name], DF11Array) and layers[name].stack_shape == (LAYERS,)
        assert_same_bits(df11_jax.decompress(layers[name]), jnp.moveaxis(before[name], 1, 0))
    for name in ("norm", "router"):
        np.testing.assert_array_equal(layers[name], np.moveaxis(before[name], 1, 0))
    assert layers["keys"].shape == (LAYERS, 3) and layers["keys"][2, 1] == before["keys"][1, 2]
    assert layers["name"] == "layers" and small["step"] == 3
    assert small["embedding"].stack_shape == ()
    assert before["up"].shape == (128, LAYERS, 256)  # what came in is as it was
    again = compress_params(small, stacked="layers/")
    assert again["decoder"]["layers"]["up"] is layers["up"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_same_as_moved_before(axis):
    stack = random_weights((3, 160, 128))
    moved = {"w": np.moveaxis(np.asarray(stack), 0, axis), "v": jnp.moveaxis(stack, 0, axis)}
    small = compress_params(moved, stacked=".", stack_axis=axis)
    expected = df11_jax.compress(stack, stack_axes=1)
    for leaf in small.values():
        assert_same_tree(leaf, expected)


def test_cast():
    weights = np.random.default_rng(0).standard_normal((128, 3, 64), dtype=np.float32)
    small = compress_params({"w": weights}, stacked="w", stack_axis=1, cast=True)["w"]
    assert_same_bits(df11_jax.decompress(small), np.moveaxis(weights, 1, 0).astype(jnp.bfloat16))


def test_tied_stacks_stay_tied():
    for weights in (jnp.ones((128, 4), jnp.bfloat16), random_weights((128, 4, 128))):
        small = compress_params({"a": weights, "b": weights}, stacked=".", stack_axis=1)
        assert small["a"] is small["b"] and small["a"].shape[0] == 4


def test_scan_blocks():
    plain = {"up": random_weights((64, LAYERS, 256), 1), "down": random_weights((256, LAYERS, 64))}
    small = compress_params(plain, stacked=".", stack_axis=1)

    def block(x, p, _):
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

    x = jnp.ones((2, 64), jnp.bfloat16)
    run = jax.jit(lambda p: scan_blocks(block, x, p)[0])
    assert_same_bits(run(small), run(in_front(plain)))
    # Of plain parameters, too, the axis is along the wrong way.
    with pytest.raises(ValueError, match=r"up: expected 256 blocks.*axis 1:.*stack_axis=1"):
        run({"down": plain["down"], "up": plain["up"]})


@pytest.mark.slow
def test_linen():
    """The same module is initialised with layers along axis 1, and takes both."""
    options = SCAN | {"variable_axes": {"params": 1, "intermediates": 0}}
    plain_model = Stack(nn.scan(Compact, **options))
    plain = init(plain_model)
    assert plain["params"]["layers"]["up"]["kernel"].shape == (128, LAYERS, 512)
    expected = jax.jit(plain_model.apply)(plain, TOKENS)
    small = compress_params(plain, stacked="/layers/", stack_axis=1)
    assert small["params"]["layers"]["up"]["kernel"].stack_shape == (LAYERS,)
    model = Stack(df11_jax.linen.scan(Compact, **options), embed=Embed)
    for variables in (plain, small):
        assert_same_bits(jax.jit(model.apply)(variables, TOKENS), expected)
    assert_same_tree(init(model), plain)
    # linen's own scan: the axis is where the compressed parameters have it.
    assert_same_bits(jax.jit(Stack(nn.scan(Compact, **SCAN)).apply)(small, TOKENS), expected)
    with pytest.raises(ValueError, match=r"cannot be mapped over axis 1.*df11_jax\.linen\.scan"):
        plain_model.apply(small, TOKENS)
    # A collection that is named together with others.
    axes = {("params", "other"): 1, "intermediates": 0}
    model = Stack(df11_jax.linen.scan(Compact, **(SCAN | {"variable_axes": axes})))
    assert_same_bits(jax.jit(model.apply)(small, TOKENS), expected)


def test_linen_stacks_that_were_taken_along_another_axis():
    options = SCAN | {"variable_axes": {"params": 1, "intermediates": 0}}
    plain = init(Stack(nn.scan(Compact, **options)))
    model = Stack(df11_jax.linen.scan(Compact, **options))
    small = compress_params(plain, stacked="layers/up", include="layers/up", stack_axis=1)
    with pytest.raises(ValueError, match=r"layers/.*: expected 4 layers|expected 128 layers"):
        model.apply(small, TOKENS)


def test_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            options = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16, "rngs": rngs}
            self.up = nnx.Linear(128, 256, **options)
            self.down = nnx.Linear(256, 128, **options)

        def __call__(self, x):
            return x + self.down(jax.nn.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(out_axes=1)
            def make(rngs):
                return Block(rngs)

            self.layers = make(rngs)

    def run(model, x, axis):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)(
            x, model.layers
        )

    model = Model(nnx.Rngs(0))
    x = jnp.ones((2, 128), jnp.bfloat16)
    expected = nnx.jit(run, static_argnums=2)(model, x, 1)
    small = compress_params(nnx.state(model), stacked="^layers/", stack_axis=1)
    nnx.update(model, small)
    df11_jax.nnx.compress(model, stacked="^layers/")
    kernel = model.layers.up.kernel
    assert isinstance(kernel, df11_jax.nnx.CompressedParam) and kernel.shape == (4, 128, 256)
    assert_same_bits(nnx.jit(run, static_argnums=2)(model, x, 0), expected)


def test_nnx_names_of_axes_move_with_them():
    """Else `nnx.get_partition_spec` was wrong, and `nnx.scan` did not find the name to remove."""

    def linear(names, wrap=tuple):
        options = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
        metadata = {"out_sharding": wrap(names)}
        return nnx.Linear(128, 128, kernel_metadata=metadata, use_bias=False, **options)

    def make(names, **options):
        meta = {"transform_metadata": {nnx.PARTITION_NAME: "layers"}}
        layers = nnx.vmap(lambda _: linear(names), out_axes=1, axis_size=LAYERS, **(meta | options))
        return layers(None)

    with nnx.use_eager_sharding(False):
        layers = make(("in", "out"))
        state = nnx.state({"layers": layers, "head": linear(("in", "out"))})
        # Without its name, there are fewer than axes.
        state["unnamed"] = nnx.state(make(("in", "out"), transform_metadata={}))
        spec = nnx.state(linear(jax.P("in", "layers", "out"), wrap=lambda spec: spec))
        spec["kernel"].set_raw_value(state["layers"]["kernel"].get_raw_value())
        state["spec"] = spec
    small = compress_params(state, stacked="layers|spec|unnamed", stack_axis=1)
    names = {name: part["kernel"].get_metadata("out_sharding") for name, part in small.items()}
    assert names == {
        "layers": ("layers", "in", "out"),
        "head": ("in", "out"),
        "unnamed": ("in", "out"),
        "spec": jax.P("layers", "in", "out"),
    }
    assert isinstance(small["layers"]["kernel"].get_raw_value(), DF11Array)
    assert state["layers"]["kernel"].get_metadata("out_sharding") == ("in", "layers", "out")

    def run(layers, axis):
        scan = nnx.scan(
            lambda x, layer: layer(x),
            in_axes=(nnx.Carry, axis),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        return scan(jnp.ones((2, 128), jnp.bfloat16), layers)

    expected = run(layers, 1)
    nnx.update(layers, small["layers"])
    df11_jax.nnx.compress(layers, stacked=".")
    assert_same_bits(run(layers, 0), expected)


class TestDisagreement:
    def test_layers_along_another_axis(self):
        plain = {"wi": random_weights((128, 4, 512)), "wo": random_weights((512, 4, 128))}
        with pytest.raises(
            ValueError,
            match=r"^layers/wo: expected 128 layers, like layers/wi, got 512\. .*"
            r"\[512, 4, 128\] and \[128, 4, 512\]\. All agree along axis 1: .*stack_axis=1",
        ):
            compress_params({"layers": plain}, stacked="^layers/")

    def test_the_few_are_named(self):
        leaves = {name: jnp.ones((4, 8)) for name in "bcd"}
        leaves |= {"a": np.ones((3, 8)), "e": np.ones((5, 8)), "scalar": np.ones(())}
        with pytest.raises(
            ValueError,
            match=r"^l/a: expected 4 layers, like l/b, got 3\. .*; neither fit l/e \[5, 8\]",
        ) as raised:
            compress_params({"l": leaves}, stacked="^l/")
        assert "l/c" not in str(raised.value) and "scalar" not in str(raised.value)

    def test_a_leaf_without_the_axis(self):
        with pytest.raises(ValueError, match=r"^l/b: expected layers along axis 1.*\[4\]"):
            compress_params({"l": {"b": np.ones(4)}}, stacked="l", stack_axis=1)

    @pytest.mark.parametrize(
        "pattern", ["layers", "layers/", "layers/.*", "/w", "layers/w$", "er/layers/(w|v)"]
    )
    def test_stacks_by_themselves(self, pattern):
        def stack(length):
            return {"layers": {"w": np.ones((length, 8)), "v": np.ones((length, 8))}}

        tree = {"encoder": stack(2), "decoder": stack(3)}
        compress_params(tree, stacked=pattern)
        tree["decoder"]["layers"]["v"] = np.ones((4, 8))
        if "w" not in pattern or "v" in pattern:  # else it leaves out the leaf that disagrees
            with pytest.raises(ValueError, match=r"decoder/layers/[vw]: expected"):
                compress_params(tree, stacked=pattern)

    def test_nnx_and_compressed_stacks(self):
        tree = {"a": random_weights((4, 128, 64)), "b": jnp.ones((4, 2))}
        small = compress_params(tree, stacked=".")
        compress_params(small | {"c": jnp.ones((3, 2))}, stacked="[ac]")  # each is by itself
        model = nnx.Dict(layers=nnx.Dict({k: nnx.Param(v) for k, v in tree.items()}))
        model.layers.c = nnx.Param(jnp.ones((3, 2)))
        model.layers.d = nnx.LoRAParam(jnp.ones((5, 2)))
        with pytest.raises(ValueError, match=r"^layers/c: expected 4 layers, like layers/a, got"):
            df11_jax.nnx.compress(model, stacked="^layers/")


def test_arguments():
    for options in ({"stack_axis": 1}, {"stack_axis": -1, "stacked": "."}):
        with pytest.raises(ValueError, match=r"stack_axis=.*expected the number of an axis"):
            compress_params({"w": jnp.ones((2, 3))}, **options)
    with pytest.raises(TypeError):
        compress_params({"w": jnp.ones((2, 3))}, stacked=".", stack_axis="1")


def test_decompressed_is_what_was_moved():
    tree = params()["decoder"]["layers"]
    del tree["name"], tree["keys"]
    small = compress_params({"layers": tree}, stacked="layers", stack_axis=1)
    assert_same_tree(decompress_params(small)["layers"], in_front(tree))


def test_stacks_that_have_been_moved_already():
    """The plain leaves beside a compressed one would be moved a second time."""
    params = {"layers": {"w": random_weights((256, 3, 256)), "b": jnp.ones((256, 3), jnp.bfloat16)}}
    small = compress_params(params, stacked="layers/", stack_axis=1)
    message = "layers/w: is compressed already, .* leave out stack_axis=1"
    with pytest.raises(ValueError, match=message):
        compress_params(small, stacked="layers/", stack_axis=1)
    assert compress_params(small, stacked="layers/")["layers"]["b"].shape == (3, 256)


def test_an_optimizer_state_stays_as_it_is():
    def weights(seed):
        return {"layers": {"kernel": random_weights((128, 3, 128), seed)}}

    state = {"params": weights(0), "opt_state": [{"mu": weights(1)}, {}], "step": 3}
    options = {"stacked": "layers/", "stack_axis": 1}
    small = compress_params(state, **options)
    assert small["params"]["layers"]["kernel"].stack_shape == (3,)
    moments = small["opt_state"][0]["mu"]["layers"]["kernel"]
    assert moments is state["opt_state"][0]["mu"]["layers"]["kernel"]
