"""Two processes that save and restore together."""

import socket

import pytest
from orbax_helpers import finish, restore, start_python
from test_orbax_sharding import params

import df11_jax

pytestmark = pytest.mark.slow

# Each has two of the four devices. Arrays are spread over both processes, except for the tensor's,
# which both have.
START = """
import sys
import jax

path, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)
assert jax.device_count() == 4 and jax.local_device_count() == 2

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1

import df11_jax
from df11_jax.orbax import DF11Restore, DF11Save
from orbax_helpers import assert_same_tree
from test_orbax_sharding import params, shardings

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))

def spread(tree, spec=PartitionSpec("x")):
    def place(path, array):
        here = spec if "layers" in str(path) else PartitionSpec()
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, here), lambda index: np.asarray(array)[index])
    return jax.tree.map_with_path(place, tree)

def gathered(tree):
    return multihost_utils.process_allgather(tree, tiled=True)

def shapes(tree):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)

small = spread(params())
assert not small["layers"].exponents.is_fully_addressable
"""


def run_two(program, path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return finish([start_python(START + program, path, port, i, devices=2) for i in range(2)])


def test_manager(tmp_path):
    """Asynchronously, restored as it was, onto other shardings, decompressed; by one process."""
    program = """
with ocp.CheckpointManager(path) as manager:
    for step in range(2):
        manager.save(step, args=ocp.args.Composite(
            params=DF11Save(small), opt_state=ocp.args.StandardSave({"mu": spread(params())})))
with ocp.CheckpointManager(path) as manager:
    def load(args):
        return manager.restore(1, args=ocp.args.Composite(params=args)).params

    back = load(DF11Restore())
    assert shardings(back) == shardings(small)
    assert_same_tree(gathered(back), jax.device_get(params()))
    other = spread(params(), PartitionSpec(("y", "x")))
    assert_same_tree(gathered(load(DF11Restore(shapes(other)))), jax.device_get(params()))
    weights = df11_jax.decompress_params(params())
    plain = load(DF11Restore(shapes(spread(weights))))
    assert not plain["layers"].is_fully_addressable
    assert_same_tree(gathered(plain), jax.device_get(weights))
"""
    run_two(program, tmp_path)
    small = restore(tmp_path / "1" / "params")
    assert str(df11_jax.size_report(small)) == str(df11_jax.size_report(params()))


def test_v1(tmp_path):
    program = """
v1.save_checkpointables(path, {"params": small})
back = v1.load_checkpointables(path, {"params": shapes(small)})["params"]
assert_same_tree(gathered(back), jax.device_get(params()))
response = v1.save_checkpointables_async(path + "2", {"params": small, "b": small})
response.result()
assert_same_tree(gathered(v1.load_checkpointables(path + "2")["b"]), jax.device_get(params()))
"""
    run_two(program, tmp_path / "x")


def test_compress_on_the_way_out(tmp_path):
    """Of a training run that spreads its weights over processes."""
    program = """
plain = spread(df11_jax.decompress_params(params()))
with ocp.CheckpointManager(path) as manager:
    manager.save(0, args=DF11Save(plain, compress={"stacked": "layers"}))
    manager.wait_until_finished()
    back = manager.restore(0, args=DF11Restore(shapes(small)))
assert_same_tree(gathered(back), jax.device_get(params()))
"""
    run_two(program, tmp_path)


def test_damage_is_found_by_all(tmp_path):
    """Also by the process that did not read the damaged part."""
    program = """
with ocp.CheckpointManager(path) as manager:
    manager.save(0, args=DF11Save(small))
    manager.wait_until_finished()
    if process == 0:
        from test_orbax_damage import flip_a_bit
        flip_a_bit(path, np.asarray(params()["layers"].sign_mantissa)[7].tobytes())
    multihost_utils.sync_global_devices("damaged")
    try:
        manager.restore(0, args=DF11Restore())
    except ValueError as error:
        print(error)
"""
    for output in run_two(program, tmp_path):
        assert "damaged, checksums differ: layers has" in output


def test_a_number_for_all_devices(tmp_path):
    """The step of a train state, onto a mesh that no process has alone."""
    program = """
with ocp.CheckpointManager(path) as manager:
    manager.save(0, args=DF11Save({"step": 7, "params": small}))
    manager.wait_until_finished()
    whole = NamedSharding(mesh, PartitionSpec())
    target = {"step": jax.ShapeDtypeStruct((), np.int32, sharding=whole), "params": shapes(small)}
    step = manager.restore(0, args=DF11Restore(target))["step"]
assert step.sharding == whole and step.dtype == np.int32 and int(step) == 7
"""
    run_two(program, tmp_path)


def test_with_a_mesh_that_is_set(tmp_path):
    """That of the model, as programs set it once for all that they do."""
    program = """
expected = jax.device_get(params())
plain = spread(df11_jax.decompress_params(params()))
jax.set_mesh(mesh)
with ocp.CheckpointManager(path) as manager:
    manager.save(0, args=DF11Save(small))
    manager.save(1, args=DF11Save(plain, compress={"stacked": "layers"}))
    manager.wait_until_finished()
    backs = [manager.restore(step, args=DF11Restore(shapes(small))) for step in range(2)]
    weights = manager.restore(0, args=DF11Restore(shapes(plain)))
for back in backs:
    assert shardings(back) == shardings(small)
    assert_same_tree(gathered(back), expected)
assert shardings(weights) == shardings(plain)
assert_same_tree(gathered(weights), gathered(plain))
"""
    run_two(program, tmp_path)
