"""Sharded models stay sharded: compressed where they lie, decoded there, with the same results."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mostly_slow import mostly_slow
from payloads import assert_same_bits, random_weights
from processes import run_python

import df11_jax
from df11_jax import checkpoints

LAYERS, D, F = 3, 128, 512

# By name: the mesh, and how `up` [layers, d, f] and `down` [layers, f, d] are divided on it.
DIVISIONS = {
    "tensor parallel": ({"tp": 4}, P(None, None, "tp"), P(None, "tp", None)),
    "FSDP": ({"fsdp": 4}, P(None, "fsdp"), P(None, "fsdp")),
    "both": ({"fsdp": 2, "tp": 2}, P(None, "fsdp", "tp"), P(None, "tp", "fsdp")),
    "two axes at one": (
        {"fsdp": 2, "tp": 2},
        P(None, None, ("fsdp", "tp")),
        P(None, ("fsdp", "tp")),
    ),
    "replicated": ({"fsdp": 2, "tp": 2}, P(), P()),
    "stages": ({"pipe": 3}, P("pipe"), P("pipe")),
}
BOTH = DIVISIONS["both"]


def make_mesh(axes, axis_type=AxisType.Auto):
    size = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(axis_type,) * len(axes),
        devices=jax.devices()[:size],
    )


def plain_params():
    return {
        "up": random_weights((LAYERS, D, F), 1),
        "down": random_weights((LAYERS, F, D), 2),
        "scale": jnp.linspace(0.5, 2, LAYERS * D, dtype=jnp.float32).reshape(LAYERS, D),
    }


def shardings(division, axis_type=AxisType.Auto):
    axes, up, down = division
    mesh = make_mesh(axes, axis_type)
    specs = {"up": up, "down": down, "scale": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def sharded_params(division, axis_type=AxisType.Auto):
    return jax.device_put(plain_params(), shardings(division, axis_type))


def compress(params):
    return df11_jax.compress_params(params, stacked="", min_size=0, include="up|down")


def block(x, params, _):
    hidden = jax.nn.relu(x @ params["up"])
    return x * params["scale"].astype(x.dtype) + hidden @ params["down"], None


def plain_loss(x, params):
    x, _ = jax.lax.scan(lambda x, layer: block(x, layer, None), x, params)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def small_loss(x, params):
    x, _ = df11_jax.scan_blocks(block, x, params)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def gathers_payload(function, *args):
    text = function.lower(*args).compile().as_text()
    return bool(re.search(r"= \(?u32\[.*(all-gather|collective-permute|all-to-all)", text))


@pytest.mark.parametrize("name", DIVISIONS)
def test_shards_are_compressed_and_decoded_where_they_lie(name):
    plain = sharded_params(DIVISIONS[name])
    small = compress(plain)
    for key in ("up", "down"):
        weights, leaf = plain[key], small[key]
        assert leaf.shape == weights.shape
        assert leaf.sharding.is_equivalent_to(weights.sharding, leaf.ndim)
        per_device = {
            device: sum(
                shard.data.nbytes
                for array in leaf.payload
                for shard in array.addressable_shards
                if shard.device == device
            )
            for device in weights.sharding.device_set
        }
        most = weights.addressable_shards[0].data.nbytes
        assert 0.6 * most < max(per_device.values()) < 0.8 * most
        assert set(per_device.values()) == {leaf.compressed_nbytes * most // weights.nbytes}
        whole = jax.jit(df11_jax.decompress)
        for decoded in (whole(leaf), df11_jax.decompress(leaf)):
            assert_same_bits(decoded, weights)
            assert decoded.sharding.is_equivalent_to(weights.sharding, leaf.ndim)
        assert not gathers_payload(whole, leaf)


@pytest.mark.parametrize("name", mostly_slow(["both", "tensor parallel", "FSDP", "replicated"]))
def test_results_are_those_of_plain_weights(name):
    """The forward pass and derivatives: sums are divided as for plain weights."""
    plain = sharded_params(DIVISIONS[name])
    small = compress(plain)
    x = jax.random.normal(jax.random.key(0), (8, D), jnp.bfloat16)
    axis = "fsdp" if "fsdp" in DIVISIONS[name][0] else None
    x = jax.device_put(x, NamedSharding(plain["up"].sharding.mesh, P(axis)))
    run = jax.jit(jax.value_and_grad(small_loss))
    (loss, grad), (expected, expected_grad) = (
        run(x, small),
        jax.jit(jax.value_and_grad(plain_loss))(x, plain),
    )
    assert loss == expected
    assert_same_bits(grad, expected_grad)
    assert not gathers_payload(run, x, small)


def test_explicit_axes():
    plain = sharded_params(BOTH, AxisType.Explicit)
    small = compress(plain)
    decode = jax.jit(df11_jax.decompress_params)
    for key, decoded in decode(small).items():
        assert decoded.sharding.is_equivalent_to(plain[key].sharding, decoded.ndim)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(plain[key]))
    assert not gathers_payload(decode, small)

    def total(x, layer, _):
        return x + jnp.sum(layer["up"], dtype=jnp.float32), jnp.max(layer["down"], axis=1)

    found = jax.jit(lambda params: df11_jax.scan_blocks(total, jnp.float32(0), params))(small)
    expected = jax.jit(lambda p: jax.lax.scan(lambda x, w: total(x, w, None), jnp.float32(0), p))
    for one, other in zip(found, expected(plain), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    # The words of exponents, and of nothing else.
    mesh, up = small["up"].sharding.mesh, small["up"]
    words = jax.device_put(up.exponents, NamedSharding(mesh, P(None, None, None, "tp")))
    with pytest.raises(ValueError, match=r"tensor: its arrays are sharded .*df11_jax\.device_put"):
        df11_jax.decompress(dataclasses.replace(up, exponents=words))


def test_transformations():
    plain = sharded_params(BOTH)["up"]
    small = df11_jax.compress(plain, stack_axes=1)
    spec, mesh = plain.sharding.spec, plain.sharding.mesh
    by_layer = jax.jit(jax.vmap(df11_jax.decompress))
    assert_same_bits(by_layer(small), plain)
    assert not gathers_payload(by_layer, small)
    index = jnp.array([2, 0])
    by_index = jax.jit(jax.vmap(lambda i: df11_jax.decompress(df11_jax.DF11Slice(small, i))))
    assert_same_bits(by_index(index), np.asarray(plain)[np.asarray(index)])
    here = jax.jit(jax.shard_map(df11_jax.decompress, mesh=mesh, in_specs=spec, out_specs=spec))
    assert_same_bits(here(small), plain)
    exported = jax.export.export(here, disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS)(small)
    assert_same_bits(jax.export.deserialize(exported.serialize()).call(small), plain)
    shapes = jax.eval_shape(df11_jax.decompress, small)
    assert (shapes.shape, shapes.dtype) == (plain.shape, plain.dtype)
    constrained = jax.jit(lambda a: jax.lax.with_sharding_constraint(a, plain.sharding))(small)
    assert constrained.sharding == plain.sharding
    assert_same_bits(jax.jit(df11_jax.decompress, in_shardings=plain.sharding)(small), plain)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_vmap_over_an_axis_that_is_sharded(axis_type):
    """Of stages or experts, say, each of which is on devices of its own."""
    where = NamedSharding(make_mesh({"pipe": 2, "tp": 2}, axis_type), P("pipe", None, "tp"))
    plain = jax.device_put(random_weights((4, D, 128)), where)
    small = df11_jax.compress(plain, stack_axes=1)
    by_layer = jax.jit(jax.vmap(df11_jax.decompress))
    decoded = by_layer(small)
    assert_same_bits(decoded, plain)
    assert decoded.sharding.is_equivalent_to(where, 3)
    assert not gathers_payload(by_layer, small)


def test_meshes_of_both_types_of_axes():
    mesh = jax.make_mesh((2, 2), ("a", "e"), axis_types=(AxisType.Auto, AxisType.Explicit))
    where = NamedSharding(mesh, P(None, "a", "e"))
    plain = jax.device_put(random_weights((2, D, 128)), where)
    small = df11_jax.compress(plain, stack_axes=1)
    decode = jax.jit(df11_jax.decompress)
    assert_same_bits(decode(small), plain)
    assert decode(small).sharding.is_equivalent_to(where, 3)
    assert not gathers_payload(decode, small)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_in_a_shard_map_over_some_axes(axis_type):
    mesh = make_mesh({"fsdp": 2, "tp": 2}, axis_type)
    plain = jax.device_put(random_weights((2, D, 128)), NamedSharding(mesh, P(None, "fsdp", "tp")))
    small = df11_jax.compress(plain, stack_axes=1)
    spec = P(None, None, "tp")

    def here(function, out_spec):
        return jax.jit(
            jax.shard_map(
                function,
                in_specs=(P(), spec),
                out_specs=out_spec,
                axis_names={"tp"},
            )
        )

    def total(x, a):
        weights = df11_jax.decompress(a) if isinstance(a, df11_jax.DF11Array) else a
        return jax.lax.psum((x * weights.astype(jnp.float32)).sum(), "tp")

    x = jnp.float32(3)
    with jax.set_mesh(mesh):
        assert_same_bits(here(lambda _, a: df11_jax.decompress(a), spec)(x, small), plain)
        gradient = jax.grad(here(total, P()))
        np.testing.assert_allclose(gradient(x, small), gradient(x, plain), rtol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_disable_jit(axis_type):
    where = NamedSharding(make_mesh({"tp": 4}, axis_type), P(None, None, "tp"))
    plain = jax.device_put(random_weights((2, D, 128)), where)
    small = df11_jax.compress(plain, stack_axes=1)
    with jax.disable_jit():
        assert_same_bits(df11_jax.decompress(small), plain)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_ranks_and_dtypes_that_users_do_not_let_jax_promote(axis_type):
    where = NamedSharding(make_mesh({"tp": 4}, axis_type), P(None, None, "tp"))
    plain = jax.device_put(random_weights((2, D, 128)), where)
    small = df11_jax.compress(plain, stack_axes=1)
    chosen = df11_jax.DF11Slice(small, jnp.array([1, 0]))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert_same_bits(df11_jax.decompress(small), plain)
        assert_same_bits(df11_jax.decompress(chosen), plain[::-1])


def test_programs_of_different_layouts_differ():
    """The cache of compiled programs knows them by their text, which has no callbacks in it."""
    where = NamedSharding(make_mesh({"tp": 4}), P(None, "tp"))
    rows = df11_jax.compress(jax.device_put(random_weights((D, 4 * D)), where))
    layout = dataclasses.replace(rows.layout, along_columns=True)

    def text(a):
        text = jax.jit(lambda a: df11_jax.decompress(a)).lower(a).as_text()
        return re.sub(r'backend_config = "\d+"', "", text)

    assert text(rows) == text(rows) != text(dataclasses.replace(rows, layout=layout))


def test_products():
    plain = sharded_params(BOTH)["up"]
    small = df11_jax.compress(plain, stack_axes=1)
    x = jax.random.normal(jax.random.key(0), (2, D), jnp.bfloat16)
    assert_same_bits(df11_jax.dot(x, small[1]), jax.jit(jnp.matmul)(x, plain[1]))
    here = jax.shard_map(
        df11_jax.dot,
        mesh=plain.sharding.mesh,
        in_specs=(P(None, "fsdp"), P("fsdp", "tp")),
        out_specs=P("fsdp", "tp"),
    )
    partial = jax.jit(here)(x, small[1])
    for i in range(2):
        rows = slice(i * D // 2, (i + 1) * D // 2)
        expected = x[:, rows] @ np.asarray(plain[1])[rows]
        assert_same_bits(partial[2 * i : 2 * i + 2], expected)


def test_from_the_host():
    """No device gets more than its share, not even for a moment."""
    host = {name: np.asarray(array) for name, array in plain_params().items()}
    where = shardings(BOTH)
    small = df11_jax.compress_params(
        host, shardings=where, stacked="", min_size=0, include="up|down"
    )
    expected = compress(sharded_params(BOTH))
    assert jax.tree.structure(small) == jax.tree.structure(expected)
    for array, like in zip(jax.tree.leaves(small), jax.tree.leaves(expected), strict=True):
        assert array.sharding.is_equivalent_to(like.sharding, array.ndim)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(like))
    again = df11_jax.compress_params(host, shardings=where, like=small)
    assert [*map(jnp.shape, jax.tree.leaves(again))] == [*map(jnp.shape, jax.tree.leaves(small))]
    other = {**where, "up": NamedSharding(where["up"].mesh, P(None, "fsdp"))}
    with pytest.raises(
        ValueError, match=r"up: is sharded into \[2, 1\] parts .* expected \[2, 2\]"
    ):
        df11_jax.compress_params(host, shardings=other, like=small)


def test_stack_axes_are_moved_with_their_shardings():
    weights = random_weights((D, LAYERS, F))
    where = NamedSharding(make_mesh(BOTH[0]), P("fsdp", None, "tp"))
    (small,) = df11_jax.compress_params(
        [weights], shardings=where, stacked="", stack_axis=1, min_size=0
    )
    assert small.sharding.spec == P(None, "fsdp", "tp")
    assert_same_bits(df11_jax.decompress(small), np.moveaxis(np.asarray(weights), 1, 0))


@pytest.mark.parametrize("begin", ["one device", "both"])
@pytest.mark.parametrize("end", ["one device", *DIVISIONS])
def test_device_put(begin, end):
    plain = plain_params()
    small = compress(plain if begin == "one device" else sharded_params(DIVISIONS[begin]))
    last = jax.devices()[-1]
    where = last if end == "one device" else shardings(DIVISIONS[end])
    placed = df11_jax.device_put(small, where)
    expected = jax.device_put(plain, where)
    for key, leaf in placed.items():
        assert leaf.sharding.is_equivalent_to(expected[key].sharding, leaf.ndim)
        if key != "scale":
            assert_same_bits(df11_jax.decompress(leaf), plain[key])
    # What fits is not compressed anew.
    again = df11_jax.device_put(placed, where)
    assert again["up"].layout == placed["up"].layout


def test_leaves_of_all_kinds_are_placed():
    where = shardings(BOTH)["up"]
    weights = plain_params()["up"]
    small = df11_jax.compress(weights, stack_axes=1)
    tree = {"plain": weights, "small": small, "step": 3, "name": "it", "none": None}
    placed = df11_jax.compress_params(tree, shardings=where, min_size=weights.size + 1)
    assert (placed["step"], placed["name"], placed["none"]) == (3, "it", None)
    for key in ("plain", "small"):
        assert placed[key].sharding.is_equivalent_to(where, 3)
        assert_same_bits(df11_jax.decompress(placed[key]), weights)
    # A PartitionSpec means the mesh that is set, as for jax.device_put.
    with jax.set_mesh(where.mesh):
        again = df11_jax.device_put(small, where.spec)
    assert again.sharding.is_equivalent_to(where, 3)
    like = df11_jax.compress_params({"a": placed["small"]}, like={"a": again}, shardings=where)
    assert like["a"].sharding.is_equivalent_to(where, 3)
    other = NamedSharding(where.mesh, P(None, ("fsdp", "tp")))
    with pytest.raises(ValueError, match=r"a: is divided into \[2, 2\] parts, as in like"):
        df11_jax.compress_params({"a": again}, like={"a": again}, shardings=other)


def test_replicated_like_what_was_replicated():
    weights, everywhere = random_weights((D, D)), NamedSharding(make_mesh({"tp": 4}), P())
    like = jax.device_put(df11_jax.compress(weights), everywhere)
    small = df11_jax.compress(jax.device_put(weights, everywhere), like=like)
    assert [a.sharding for a in small.payload] == [a.sharding for a in like.payload]
    assert_same_bits(df11_jax.decompress(small), weights)


def test_out_of_host_memory():
    where = NamedSharding(make_mesh({"tp": 4}), P("tp"))
    weights = random_weights((D, D))
    here = jax.device_put(weights, where.with_memory_kind("pinned_host"))
    small = df11_jax.compress(here)
    assert {a.sharding.memory_kind for a in small.payload} == {"pinned_host"}
    moved = df11_jax.device_put(small, NamedSharding(where.mesh, P(None, "tp")))
    assert_same_bits(df11_jax.decompress(moved), weights)


def test_what_cannot_be_divided():
    weights = random_weights((LAYERS, D, 509))
    where = NamedSharding(make_mesh({"tp": 4}), P(None, None, "tp"))
    for function in (
        lambda: df11_jax.compress_params({"a": {"w": weights}}, shardings=where),
        lambda: df11_jax.device_put({"a": {"w": df11_jax.compress(weights)}}, where),
    ):
        with pytest.raises(ValueError, match="509") as caught:
            function()
        assert any("the leaf a/w" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="has 3 axes, and the tensor 2"):
        df11_jax.device_put(df11_jax.compress(weights[0]), where)


def test_trees_of_shardings_have_all_keys():
    tree = {"a": random_weights((8, 8)), "b": {"c": random_weights((8, 8))}}
    where = NamedSharding(make_mesh({"tp": 4}), P())
    for function in (
        lambda: df11_jax.compress_params(tree, shardings={"a": where, "b": {}}),
        lambda: df11_jax.device_put(tree, {"a": where, "b": {}}),
    ):
        with pytest.raises(
            ValueError, match=r"tree of shardings .* has all its keys(.|\n)*\['b'\]"
        ):
            function()


@pytest.mark.parametrize("shape", [(LAYERS, 0, 8), (LAYERS, 8, 4), (LAYERS, 4, 8, 2), (LAYERS,)])
def test_small_shapes(shape):
    """Parts of one weight and of none, and more axes than the mesh has."""
    where = NamedSharding(make_mesh({"tp": 4}), P(None, *("tp",) * (len(shape) > 1)))
    plain = jax.device_put(random_weights(shape), where)
    small = df11_jax.compress(plain, stack_axes=1)
    assert_same_bits(jax.jit(df11_jax.decompress)(small), plain)
    assert_same_bits(jax.jit(lambda a: df11_jax.decompress(a[1]))(small), plain[1])


@pytest.mark.slow
def test_files(tmp_path):
    small = compress(sharded_params(BOTH))
    checkpoints.save(small, tmp_path / "it")
    for name in ("both", "FSDP", "replicated"):
        where = shardings(DIVISIONS[name])
        loaded = checkpoints.load(tmp_path / "it", device=where)
        for key in ("up", "down"):
            assert loaded[key].sharding.is_equivalent_to(where[key], loaded[key].ndim)
            assert_same_bits(df11_jax.decompress(loaded[key]), plain_params()[key])
        kept = name != "FSDP"  # which divides axes that the parts do not
        assert (loaded["up"].layout == small["up"].layout) == kept
    assert_same_bits(
        df11_jax.decompress(checkpoints.load(tmp_path / "it")["up"]), plain_params()["up"]
    )


@pytest.mark.slow
def test_eight_devices():
    program = """
import jax, numpy as np, test_sharding as t
t.DIVISIONS = {
    "both": ({"fsdp": 2, "tp": 4}, t.P(None, "fsdp", "tp"), t.P(None, "tp", "fsdp")),
    "FSDP": ({"fsdp": 8}, t.P(None, "fsdp"), t.P(None, "fsdp")),
}
assert jax.device_count() == 8
for name in t.DIVISIONS:
    t.test_shards_are_compressed_and_decoded_where_they_lie(name)
    t.test_results_are_those_of_plain_weights(name)
"""
    run_python(program, devices=8)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(None, "dp"), P("dp", "tp"), P("dp")])
def test_rows_of_a_product_stay_where_they_are(axis_type, spec):
    mesh = make_mesh({"dp": 2, "tp": 2}, axis_type)
    weights = random_weights((D, F))
    x = jax.device_put(random_weights((2, 4, D), scale=1), NamedSharding(mesh, spec))
    product = jax.jit(df11_jax.dot)
    for matrix in (df11_jax.compress(weights), weights):
        with jax.set_mesh(mesh):
            matrix = jax.device_put(matrix, NamedSharding(mesh, P()))
            compiled = product.lower(x, matrix).compile()
        assert "all-gather" not in compiled.as_text()
        y = compiled(x, matrix)
        assert tuple(y.sharding.spec)[: len(spec)] == tuple(spec)
        assert_same_bits(y, np.asarray(x) @ weights)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()])
def test_device_put_from_elsewhere_than_the_mesh_that_is_set(spec):
    weights = random_weights((D, F))
    mesh = make_mesh({"x": 4})
    others = [jax.devices()[3]]
    for axis_type in AxisType.Auto, AxisType.Explicit:
        others.append(NamedSharding(make_mesh({"y": 2}, axis_type), P("y")))
    for other in others:
        small = df11_jax.compress(jax.device_put(weights, other))
        with jax.set_mesh(mesh):
            placed = df11_jax.device_put(small, NamedSharding(mesh, spec))
            again = df11_jax.compress_params([small], shardings=NamedSharding(mesh, spec))[0]
        for leaf in (placed, again):
            assert leaf.sharding.mesh == mesh
            assert_same_bits(df11_jax.decompress(leaf), weights)


def test_leaves_on_devices_of_their_own():
    weights = {f"layer{i}": random_weights((D, F), i) for i in range(2)}
    plain = {
        n: jax.device_put(w, d)
        for (n, w), d in zip(weights.items(), jax.devices()[:2], strict=True)
    }
    back = df11_jax.decompress_params(df11_jax.compress_params(plain))
    for name, leaf in back.items():
        assert leaf.devices() == plain[name].devices()
        assert_same_bits(leaf, weights[name])
