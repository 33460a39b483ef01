"""What hosts would send to each other, counted in the text of programs."""

import functools

import jax
import jax.numpy as jnp
import network
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

WORDS = 1024


@pytest.fixture(scope="module")
def program():
    """In each step: three sums over four devices, one over neighbours, a permutation, and a gather.

    Neighbours are those of a host, if there are two.
    """
    mesh = Mesh(jax.devices()[:4], ("all",))
    neighbours = [[0, 1], [2, 3]]

    def step(x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(jax.lax.psum(x, "all")), x)
        x = jnp.sin(jax.lax.psum(x, "all", axis_index_groups=neighbours))
        x = jnp.sin(jax.lax.ppermute(x, "all", [(i, (i + 1) % 4) for i in range(4)]))
        return x + jax.lax.all_gather(x, "all", tiled=True).reshape(4, -1).sum(0)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False
    )
    def run(x):
        return jax.lax.while_loop(lambda x: x[0] < 1, step, x)

    return run.lower(jnp.zeros(4 * WORDS)).compile().as_text()


def test_bytes_are_those_of_rings(program):
    array = 4 * WORDS
    sums, gather, permutation = 3 * 2 * 3 / 4 * array, 3 / 4 * 4 * array, array
    assert network.bytes_sent(program, 2) == sums + gather + permutation
    # Neighbours are on different hosts.
    assert network.bytes_sent(program, 4) == sums + gather + permutation + array


def test_one_host_sends_nothing(program):
    assert network.bytes_sent(program, 1) == 0
