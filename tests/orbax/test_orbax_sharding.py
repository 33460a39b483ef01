"""Shardings of the payloads: kept, changed, and lost with the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax_helpers import assert_same_tree, restore, run_python, save
from payloads import assert_same_bits, random_weights

import df11_jax
from df11_jax.orbax import _restore


def params():
    """A stack of eight layers, and one tensor."""
    return df11_jax.compress_params(
        {"layers": random_weights((8, 64, 64)), "w": random_weights((128, 130))}, stacked="layers"
    )


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("x",))


def sharded(tree, devices):
    """Layers along their stack axis; of the tensor, what can be split."""

    def place(array):
        split = array.shape[0] % devices == 0
        spec = PartitionSpec("x") if split else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh(devices), spec))

    return jax.tree.map(place, tree)


def shardings(tree):
    return [array.sharding for array in jax.tree.leaves(tree)]


def as_shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


@pytest.fixture(scope="module")
def from_eight(tmp_path_factory):
    """Saved by a process with eight devices."""
    path = tmp_path_factory.mktemp("eight") / "x"
    program = """
import sys
from orbax_helpers import save
from test_orbax_sharding import params, sharded
save(sys.argv[1], sharded(params(), 8))
"""
    run_python(program, path, devices=8)
    return path


def test_same_devices(tmp_path):
    tree = sharded(params(), 2)
    assert len(tree["layers"].sign_mantissa.addressable_shards) == 2
    save(tmp_path / "x", tree)
    for back in (restore(tmp_path / "x"), restore(tmp_path / "x", as_shapes(tree))):
        assert_same_tree(back, params())
        assert shardings(back) == shardings(tree)


def test_fewer_devices(from_eight):
    tree = sharded(params(), 2)
    back = restore(from_eight, as_shapes(tree))
    assert_same_tree(back, params())
    assert shardings(back) == shardings(tree)


def test_devices_that_are_no_more(from_eight):
    """Without a target, everything is put on the default device."""
    back = restore(from_eight)
    assert_same_tree(back, params())
    assert {array.sharding for array in jax.tree.leaves(back)} == {jnp.zeros(()).sharding}


def test_more_devices(tmp_path):
    save(tmp_path / "x", sharded(params(), 2))
    program = """
import sys, jax
from orbax_helpers import assert_same_tree, restore
from test_orbax_sharding import as_shapes, params, sharded, shardings
tree = sharded(params(), 8)
back = restore(sys.argv[1], as_shapes(tree))
assert_same_tree(back, params())
assert shardings(back) == shardings(tree)
assert len(back["layers"].exponents.addressable_shards) == 8
"""
    run_python(program, tmp_path / "x", devices=8)


def test_decompress_onto_a_sharding(from_eight):
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh(2), PartitionSpec(None, "x"))
        )
        for name, leaf in params().items()
    }
    back = restore(from_eight, target)
    for name, leaf in params().items():
        assert back[name].sharding == target[name].sharding
        assert_same_bits(back[name], df11_jax.decompress(leaf))


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """The weights of a stack and of a tensor, and a plain leaf, as they were before compression."""
    path = tmp_path_factory.mktemp("divided") / "x"
    tp = NamedSharding(mesh(4), PartitionSpec(None, "x"))
    plain = {
        "layers": jax.device_put(
            random_weights((2, 256, 512)), NamedSharding(mesh(4), PartitionSpec(None, None, "x"))
        ),
        "w": jax.device_put(random_weights((256, 512)), tp),
        "scale": jax.device_put(jnp.ones((8, 512)), tp),
    }
    save(path, df11_jax.compress_params(plain, stacked="layers"))
    return path, plain


@pytest.mark.parametrize("target", ["none", "compressed", "shapes", "elsewhere"])
def test_decompress_in_place(target, divided, monkeypatch):
    """Decompressed leaves are sharded as plain ones are, and each device decodes its parts."""
    path, plain = divided
    decoded = []

    def decompress_params(params):
        decoded.extend(params.values())
        return df11_jax.decompress_params(params)

    monkeypatch.setattr(_restore, "decompress_params", decompress_params)
    expected, item = shardings(plain), None
    if target == "compressed":
        item = as_shapes(df11_jax.compress_params(plain, stacked="layers"))
    elif target == "shapes":
        item = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), plain)
    elif target == "elsewhere":  # whole parts, on fewer devices
        moved = jax.tree.map(
            lambda a: jax.device_put(a, NamedSharding(mesh(2), a.sharding.spec)), plain
        )
        expected, item = shardings(moved), as_shapes(moved)
    back = restore(path, item, decompress=True)
    assert shardings(back) == expected
    assert_same_tree(back, plain)
    assert len(decoded) == 2
    devices = 2 if target == "elsewhere" else 4
    for leaf in decoded:
        words = leaf.sign_mantissa
        assert len(words.sharding.device_set) == devices
        assert all(shard.data.size == words.size // devices for shard in words.addressable_shards)


def test_decompress_onto_another_division(divided):
    """Where parts would have to be divided, the host decodes: no device gets the whole."""
    path, plain = divided
    rows = NamedSharding(mesh(4), PartitionSpec("x"))
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
        for name, leaf in plain.items()
        if name != "layers"
    }
    back = restore(path, target, partial_restore=True)
    assert shardings(back) == [rows, rows]
    assert_same_tree(back, {name: plain[name] for name in target})


def test_decompress_what_lies_on_a_mesh_undivided(tmp_path):
    """The sharding of stack axes is kept; that of words says nothing of the tensor."""
    tree = sharded(params(), 2)
    assert tree["w"].sign_mantissa.sharding.spec == PartitionSpec("x")
    save(tmp_path / "x", tree)
    for item in (None, as_shapes(tree)):
        back = restore(tmp_path / "x", item, decompress=True)
        assert_same_tree(back, df11_jax.decompress_params(params()))
        assert back["layers"].sharding == tree["layers"].sharding
        assert back["w"].sharding == NamedSharding(mesh(2), PartitionSpec())


def test_decompress_of_devices_that_are_no_more(from_eight):
    back = restore(from_eight, decompress=True)
    assert_same_tree(back, df11_jax.decompress_params(params()))
    assert set(shardings(back)) == {jnp.zeros(()).sharding}


def test_compress_onto_a_sharding(tmp_path):
    plain = df11_jax.decompress_params(params())
    save(tmp_path / "x", plain)
    tree = sharded(params(), 2)
    back = restore(tmp_path / "x", as_shapes(tree))
    assert_same_tree(back, params())
    assert shardings(back) == shardings(tree)


def test_compress_sharded_parameters_on_the_way_out(tmp_path):
    plain = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh(2), PartitionSpec(None, "x"))),
        df11_jax.decompress_params(params()),
    )
    save(tmp_path / "x", plain, compress={"stacked": "layers"})
    assert_same_tree(restore(tmp_path / "x"), params())


def test_with_a_mesh_that_is_set(tmp_path, from_eight):
    """What has no place of its own goes to the default device, as ever, not to the whole mesh."""
    plain = df11_jax.decompress_params(params())
    save(tmp_path / "x", plain, compress={"stacked": "layers"})
    with jax.set_mesh(mesh(4)):
        compressed = restore(tmp_path / "x")
        gone = restore(from_eight)
        weights = restore(from_eight, decompress=True)
    (default,) = jax.device_put(0).devices()
    for back, expected in ((compressed, params()), (gone, params()), (weights, plain)):
        assert_same_tree(back, expected)
        assert {tuple(array.devices()) for array in jax.tree.leaves(back)} == {(default,)}


def test_decompress_what_the_host_saved_with_a_mesh_that_is_set(tmp_path):
    """Onto the default device, and as free to be moved as what was never placed."""
    on_host = jax.tree.map(np.asarray, params())
    save(tmp_path / "x", on_host)
    with jax.set_mesh(mesh(4)):
        back = restore(tmp_path / "x", decompress=True)
    assert_same_tree(back, df11_jax.decompress_params(params()))
    (default,) = jax.device_put(0).devices()
    for array in jax.tree.leaves(back):
        assert array.devices() == {default} and not array.committed


def test_the_host_decodes_with_a_mesh_that_is_set(divided, monkeypatch):
    """By no program, which each device of the mesh would run."""
    path, plain = divided
    monkeypatch.delattr(_restore, "decompress_params")
    rows = NamedSharding(mesh(4), PartitionSpec("x"))
    weights = jax.device_put(plain["w"], rows)
    again = df11_jax.compress_params({"w": weights})
    with jax.set_mesh(mesh(4)):
        back = restore(path, {"w": as_shapes(weights)}, partial_restore=True)
        compressed = restore(path, as_shapes(again), partial_restore=True)
    assert shardings(back) == [rows]
    assert_same_tree(back, {"w": plain["w"]})
    assert shardings(compressed) == shardings(again)
    assert_same_tree(compressed, again)


@pytest.mark.parametrize("where", ["a device", "a mesh", "elsewhere"])
def test_leaves_of_one_form_share_a_program(tmp_path, where, caplog):
    """Whatever their names: to compile one for each took most of the time of restoring."""
    weights, item = random_weights((256, 512)), None
    tp = NamedSharding(mesh(4), PartitionSpec(None, "x"))
    if where == "a mesh":
        weights = jax.device_put(weights, tp)
    elif where == "elsewhere":
        item = jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=tp)
    small = df11_jax.compress(weights)
    save(tmp_path / "first", {"a": small})
    save(tmp_path / "others", {"b": small, "c": small})
    restore(tmp_path / "first", item and {"a": item}, decompress=True)
    with jax.log_compiles():
        back = restore(tmp_path / "others", item and {"b": item, "c": item}, decompress=True)
    assert not [text for text in caplog.messages if "XLA compilation" in text]
    for array in back.values():
        assert_same_bits(array, weights)
