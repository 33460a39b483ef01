"""Stacks of compressed tensors from single ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from payloads import assert_same_bits, random_weights

from df11_jax import DF11Array, _stack, compress, decompress, stack
from df11_jax._host_arrays import empty_aligned
from df11_jax._host_codec import encode
from df11_jax._layout import make_layout
from df11_jax._stack import StackBuilder


def slices(count, shape=(48, 64)):
    """Tensors of different entropy, hence with different lengths of their exponents."""
    return [random_weights(shape, i, 10.0 ** -(i % 3)) * (1 + i % 2) for i in range(count)]


@pytest.mark.parametrize("shape", [(), (7,), (48, 64), (2, 130, 72), (0, 4)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_stack(count, shape):
    weights = slices(count, shape)
    stacked = stack([compress(w) for w in weights])
    assert stacked.shape == (count, *shape) and stacked.stack_shape == (count,)
    assert_same_bits(decompress(stacked), jnp.stack(weights))
    for i in range(count):
        assert_same_bits(decompress(stacked[i]), weights[i])


def test_exponents_are_padded_to_the_longest():
    rough = random_weights((64, 64), 0)
    even = jnp.ones((64, 64), jnp.bfloat16)
    arrays = [compress(even), compress(rough)]
    lengths = [array.exponents.shape[-1] for array in arrays]
    assert lengths[0] < lengths[1]
    assert stack(arrays).exponents.shape == (2, lengths[1])
    assert_same_bits(decompress(stack(arrays)), jnp.stack([even, rough]))


def test_stack_of_stacks_and_under_jit():
    weights = jnp.stack(slices(6)).reshape(2, 3, 48, 64)
    arrays = [compress(w, stack_axes=1) for w in weights]
    stacked = jax.jit(lambda *arrays: stack(arrays))(*arrays)
    assert stacked.stack_shape == (2, 3)
    assert_same_bits(decompress(stacked), weights)


def test_what_cannot_be_stacked():
    array = compress(slices(1)[0])
    with pytest.raises(ValueError, match="at least one"):
        stack([])
    with pytest.raises(TypeError, match=r"arrays\[1\]: expected a DF11Array, got ndarray"):
        stack([array, np.zeros(3)])
    other = compress(random_weights((64, 48)))
    with pytest.raises(ValueError, match=r"arrays\[1\]: expected a tensor like .*48,64.*64,48"):
        stack([array, other])
    with pytest.raises(ValueError, match=r"arrays\[1\]"):
        stack([array, jax.tree.map(lambda leaf: leaf[None], array)])
    with pytest.raises(ValueError, match=r"arrays\[1\]"):
        stack([array, compress(slices(1)[0], along_columns=True)])


@pytest.mark.parametrize("copied_words", [2**20, 100])  # at once, and in several threads
@pytest.mark.parametrize("shape", [(48, 64), (7,), (130, 72)])
def test_builder_gives_what_compress_gives(shape, copied_words, monkeypatch):
    monkeypatch.setattr(_stack, "_COPIED_WORDS", copied_words)
    weights = np.stack([np.asarray(w) for w in slices(5, shape)])
    layout = make_layout(shape)
    builder = StackBuilder((5,), layout)
    for start, end in ((3, 5), (0, 1), (1, 3)):
        builder.put(start, encode(weights[start:end], "weights", layout))
    built, expected = builder.build(), compress(weights, stack_axes=1)
    assert isinstance(built, DF11Array)
    assert built.layout == expected.layout
    for actual, want in zip(built.payload, expected.payload, strict=True):
        np.testing.assert_array_equal(actual, want)


def test_builder_misses_slices():
    layout = make_layout((48, 64))
    builder = StackBuilder((3,), layout)
    builder.put(1, encode(np.asarray(slices(1)[0])[None], "weights", layout))
    with pytest.raises(ValueError, match="the stack has 1 of 3 slices"):
        builder.build()


def test_an_empty_stack():
    assert StackBuilder((0,), make_layout((48, 64))).build().shape == (0, 48, 64)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about memory of the CPU backend")
def test_jax_takes_aligned_memory_over():
    array = empty_aligned((1000, 33), np.uint32)
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
