"""Adapters trained through frozen compressed weights: every bit as through the plain ones."""

import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import ROOT
from payloads import count_decodes

import df11_jax.linen
from df11_jax.linen import compressed

TENSORS = 7  # compressed, of a block


@pytest.fixture(scope="module")
def lora():
    spec = importlib.util.spec_from_file_location("lora", ROOT / "examples" / "lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STEPS = 3
    return module


@pytest.fixture(scope="module")
def initial(lora):
    return lora.initialise()


@pytest.fixture(scope="module")
def trained(lora, initial):
    """What plain weights give, with and without `nn.remat`, which alone changes some bits."""
    plain, _, adapters = initial
    stored = lora.Model(nn.scan(lora.Block, **lora.SCAN))
    return {
        "run again": lora.train(lora.PLAIN, plain, adapters),
        "stored": lora.train(stored, plain, adapters),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda block, scan: df11_jax.linen.scan(block, **scan), "run again"),
        (lambda block, scan: nn.scan(compressed(block), **scan), "run again"),
        (lambda block, scan: nn.scan(nn.remat(block), **scan), "run again"),
        (lambda block, scan: nn.scan(block, **scan), "stored"),
    ],
    ids=["scan", "nn.scan of compressed", "nn.scan of nn.remat", "nn.scan"],
)
def test_same_bits(lora, initial, trained, wrap, expected):
    _, small, adapters = initial
    actual = lora.train(lora.Model(wrap(lora.Block, lora.SCAN)), small, adapters)
    for pair in zip(*map(jax.tree.leaves, (actual, trained[expected])), strict=True):
        mine, theirs = (np.asarray(leaf).view(np.uint32) for leaf in pair)
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes of the CPU handler")
def test_decodes_twice_a_step(lora, initial):
    _, small, adapters = initial
    gradient = jax.jit(jax.grad(functools.partial(lora.loss_of, model=lora.COMPRESSED)))
    tokens = jnp.zeros((2, 8), jnp.int32)
    run = functools.partial(gradient, params=small, tokens=tokens)
    assert count_decodes(run, adapters) == 2 * lora.LAYERS * TENSORS + 1  # the embedding


@pytest.mark.slow
def test_memory(lora, initial):
    plain, small, adapters = initial
    frozen, compressed_frozen = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(params)) for params in (plain, small)
    )
    block = 2 * lora.WIDTH**2 * 16
    saved = lora.peak_bytes(lora.PLAIN, plain, adapters) - lora.peak_bytes(
        lora.COMPRESSED, small, adapters
    )
    assert saved > frozen - compressed_frozen - 3 * block
