"""Tensors of which each of two processes has some parts."""

import numpy as np
import pytest
from model_files import write_model
from payloads import random_weights
from test_orbax_processes import run_two

pytestmark = pytest.mark.slow


def test_divided_tensors(tmp_path):
    """Compressed in place, from the host, from files and through Orbax; decoded and moved."""
    weights = np.array(random_weights((3, 128, 512)))
    weights[:, :64] *= np.float32(2) ** np.arange(-16, 16).repeat(2)[:, None]  # takes more bits
    write_model(tmp_path / "plain", {"w": weights})
    np.save(tmp_path / "w.npy", weights.view(np.uint16))
    program = """
from df11_jax import checkpoints

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tp"))
bits = np.load(path + "/w.npy")
weights = bits.view(jnp.bfloat16)
where = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tp"))
plain = jax.make_array_from_callback(weights.shape, where, lambda index: weights[index])

def check(leaf, expected=where):
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    decoded = jax.jit(df11_jax.decompress)(leaf)
    assert decoded.sharding.is_equivalent_to(expected, leaf.ndim)
    np.testing.assert_array_equal(gathered(decoded).view(np.uint16), bits)

small = df11_jax.compress(plain, stack_axes=1)
check(small)
here = sum(s.data.nbytes for array in small.payload for s in array.addressable_shards)
assert here == small.compressed_nbytes // 2
check(df11_jax.compress_params({"w": weights}, shardings=where)["w"])
check(checkpoints.load(path + "/plain", device=where)["w"])
other = NamedSharding(mesh, PartitionSpec(None, None, ("fsdp", "tp")))
check(df11_jax.device_put(small, other), other)
try:
    checkpoints.save({"w": small}, path + "/no")
except ValueError as error:
    assert "w: is spread over several processes" in str(error)

def block(x, params, _):
    return x + (x @ params["w"]).sum(-1, keepdims=True), None

x = jnp.ones((4, 128), jnp.bfloat16)
run = jax.jit(lambda x, params: df11_jax.scan_blocks(block, x, params)[0])
of_plain = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: block(x, {"w": w}, None), x, w)[0])
np.testing.assert_array_equal(gathered(run(x, {"w": small})), gathered(of_plain(x, plain)))

with ocp.CheckpointManager(path + "/orbax") as manager:
    for step, leaf in enumerate((plain, small)):
        manager.save(step, args=DF11Save({"w": leaf}))
        manager.wait_until_finished()
        for sharding in (where, other):
            target = {"w": jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)}
            args = DF11Restore(target, compress={"stacked": "w"})
            check(manager.restore(step, args=args)["w"], sharding)
            for item in (None, target):
                decoded = manager.restore(step, args=DF11Restore(item, decompress=True))["w"]
                assert decoded.sharding.is_equivalent_to(sharding if item else where, decoded.ndim)
                np.testing.assert_array_equal(gathered(decoded).view(np.uint16), bits)
"""
    run_two(program, tmp_path)
