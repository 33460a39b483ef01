"""Tiny models that are loaded once, and runs of them that several tests make."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np

from df11_jax import models
from df11_jax.models import _cache
from df11_jax.models.prompts import pad_prompts

BF16, F32 = jnp.bfloat16, jnp.float32
NONE = np.array([], np.int32)  # no stop tokens
GREEDY, DRAWN = models.Sampling(), models.Sampling(0.8, top_k=50, top_p=0.9)
PROMPTS = [[5, 6, 7], list(range(100, 170)), [42], list(range(20))]  # of more than one bucket


@functools.cache
def load(family, compress=True):
    """Parameters and configuration of a tiny model, whose bits do not depend on compression."""
    config = dataclasses.replace(models.read_config(families.CONFIGS[family]), exact=True)
    return models.load_params(families.source_of(family), config, compress=compress), config


def run(params, config, batch=3, sampling=GREEDY):
    """The states after the prompts and after some tokens, and these tokens.

    The first one is on the host; None if it is spread over several processes.
    """
    keys, mesh = _keys(batch), models.find_mesh(params)
    state = read(params, config, batch, sampling)
    is_here = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state))
    first = jax.tree.map(np.asarray, state) if is_here else None  # the state itself is used up
    return first, models.decode(params, state, 10, sampling, keys, NONE, 12, config, mesh)


def read(params, config, batch=3, sampling=GREEDY):
    """The state after the prompts."""
    prompts = families.prompts(batch)
    lengths = np.arange(24, 24 - batch, -1, dtype=np.int32)
    mesh = models.find_mesh(params)
    return models.prefill(params, prompts, lengths, sampling, _keys(batch), NONE, 40, config, mesh)


def _keys(batch):
    return jax.random.split(jax.random.key(0), batch)


def begin(params, config):
    """The state after a prompt of two tokens, and a function that chooses five more."""
    keys, mesh = _keys(1), models.find_mesh(params)
    prompts, lengths = np.ones((1, 2), np.int32), np.array([2], np.int32)
    state = models.prefill(params, prompts, lengths, GREEDY, keys, NONE, 16, config, mesh)
    state = jax.block_until_ready(state)
    return functools.partial(models.decode, params, state, 5, GREEDY, keys, NONE, 8, config, mesh)


def all_logits(params, config, rows):
    """For each token the logits of the next, all tokens read in one pass, into an empty cache."""
    length = max(map(len, rows))
    tokens = pad_prompts(rows, length)
    positions = np.array(
        [[_cache.NOWHERE] * (length - len(row)) + list(range(len(row))) for row in rows], np.int32
    )

    @jax.jit
    def compute(params):
        cache = models.init_cache(config, *tokens.shape)
        x, _ = models.forward(params, tokens, positions, 0, cache, config)
        return models.project(params, x, config)

    logits = np.asarray(compute(params))
    return [line[-len(row) :] for line, row in zip(logits, rows, strict=True)]


def assert_same_bits(actual, expected):
    """Of trees of arrays."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8)
        )
