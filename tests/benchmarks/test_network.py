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


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,4},{1,5}}", [[0, 4], [1, 5]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['all'=4] {'all'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=3] {'x'}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['x'=2,'y'=3] {'y'}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y','x'}", [[0, 2, 1, 3]]),
    ],
)
def test_groups_in_all_forms(text, groups):
    assert network._groups(f"  %a = f32[2]{{0}} all-gather(%b), {text}, dimensions={{0}}") == groups


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="unknown groups"):
        network._groups("replica_groups=mesh['x'=4] {'x':(1)2}, dimensions={0}")
