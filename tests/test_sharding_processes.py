"""Weights that several processes divide, in the layout of one mesh."""

import pytest
from processes import find_port, finish, start_python


@pytest.mark.slow
def test_processes_of_which_some_have_devices_of_the_mesh():
    """One has a device of it, another three, and a third none: it is not waited for."""
    program = """
import sys
import jax
import numpy as np

port, process = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", 3, process)

import df11_jax
from payloads import assert_same_bits, random_weights

devices = [device for device in jax.devices() if device.process_index < 2]
if process < 2:
    mesh = jax.sharding.Mesh(np.array(devices), ("tp",))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "tp"))
    weights = np.array(random_weights((2, 64, 512)))
    weights[0, 0, :128] = np.linspace(0, 1, 128)  # so that one part has more exponents
    small = df11_jax.compress_params(weights, stacked=".", shardings=divided)
    for shard in jax.jit(df11_jax.decompress)(small).addressable_shards:
        assert_same_bits(shard.data, weights[shard.index])
    print(small.exponents.shape, len(mesh.local_devices))
"""
    port = find_port()
    started = [start_python(program, port, i, devices=n) for i, n in enumerate((1, 3, 1))]
    first, second, _ = finish(started, timeout=120)  # Gloo prints lines of its own
    *shape, count = first.splitlines()[-1].split()
    assert second.splitlines()[-1].split() == [*shape, "3"] and count == "1"
