"""What generation takes on a device, estimated from a configuration: nothing is compiled."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from df11_jax import _layout
from df11_jax._files.source import TensorInfo
from df11_jax._select import is_candidate
from df11_jax.models import _attention, _cache, _generate, _table, _transformer
from df11_jax.models._config import Config
from df11_jax.models._leaf_builders import is_candidate_stack
from df11_jax.models._memory import Memory
from df11_jax.models._shares import share_of, table_shape

# Of the coded exponents, per weight; the rest of a compressed tensor follows from its shape.
# Normally distributed weights take the least, the matrices of trained models what is expected, and
# word embeddings in groups that are padded to the longest the most.
LEAST_BITS, EXPECTED_BITS, MOST_BITS = 2.62, 2.70, 2.82

MOST_SEQUENCES = 2**20


class WeightBytes(NamedTuple):
    """What weights take.

    Attributes:
        plain: not compressed.
        compressed: as it is known, or expected.
        least, most: where what is expected may lie; the same as `compressed` if that is known.
    """

    plain: int
    compressed: int
    least: int
    most: int

    @property
    def exact(self) -> bool:
        return self.least == self.most


class Temporary(NamedTuple):
    """What comes beside weights and cache, at the peak: in a block, or in the output head.

    Attributes:
        block: the weights of a transformer block, decompressed; 0 if the peak is in the head.
        head: the piece of the output head that is decompressed at a time; 0 if it is in a block.
        cache_copy: what XLA copies of the cache.
        activations: everything else.
    """

    block: int
    head: int
    cache_copy: int
    activations: int

    @property
    def nbytes(self) -> int:
        return sum(self)


def estimate_memory(
    config: Config, *, batch: int, context: int, compress: bool = True, devices: int = 1
) -> Memory:
    """Estimates what `measure_memory` would say, without compiling anything.

    Weights are expected to compress like those of trained models. Temporary memory is that of the
    programs as XLA plans them for a GPU, rather more than less; plain weights are taken to need as
    much as compressed ones, since XLA copies them out of their stacks, often a block at a time.

    Args:
        config: of the decoder.
        batch: how many sequences.
        context: how many tokens of each there are in the cache, read or generated.
        compress: False for plain weights.
        devices: how many the model is divided over.

    Returns:
        Bytes on each device.

    Raises:
        ValueError: the context is longer than the model allows, a number is less than 1, or the
            model cannot be divided among the devices.
    """
    check_sizes(config, batch, context, devices)
    weights = estimate_weights(config, devices)
    return Memory(
        weights=weights.compressed if compress else weights.plain,
        plain_weights=weights.plain,
        cache=cache_nbytes(config, batch, context, devices),
        prefill=estimate_temporary(config, batch, context, devices=devices).nbytes,
        decode=estimate_temporary(config, batch, context, prompt=1, devices=devices).nbytes,
    )


def check_sizes(config: Config, batch: int, context: int, devices: int = 1) -> None:
    """Raises ValueError for what no model, or this one, can be asked."""
    for name, value in (("batch", batch), ("context", context), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if context > config.max_length:
        raise ValueError(
            f"context is {context}, but the model was made for {config.max_length} positions"
        )
    share_of(config, devices)


@functools.lru_cache(maxsize=8)
def estimate_weights(config: Config, devices: int = 1) -> WeightBytes:
    """What the parameters that `load_params` returns take on each device."""
    block, table = _block_shapes(share_of(config, devices)), _table_share(config, devices)
    shapes = [(config.layers, *shape) for shape in block]
    shapes += [(config.dim,), table] if config.tied else [(config.dim,), table, table]
    return sum_weights(
        _compressed_bytes(shape, stack_axes=1)
        if is_candidate_stack(shape)
        else _plain_bytes(2 * math.prod(shape))
        for shape in shapes
    )


def estimate_tensors(tensors: Iterable[TensorInfo]) -> WeightBytes:
    """What tensors take that are compressed one by one."""
    return sum_weights(
        _compressed_bytes(tensor.shape, stack_axes=0)
        if is_candidate(tensor.shape, tensor.numpy_dtype)
        else _plain_bytes(tensor.nbytes)
        for tensor in tensors
    )


def sum_weights(parts: Iterable[WeightBytes]) -> WeightBytes:
    """All of them together."""
    return WeightBytes(*map(sum, zip(WeightBytes(0, 0, 0, 0), *parts, strict=True)))


def count_parameters(config: Config) -> int:
    """How many weights the model has."""
    tables = (1 if config.tied else 2) * config.vocab * config.dim
    return config.layers * sum(map(math.prod, _block_shapes(config))) + config.dim + tables


def share_weights(config: Config, weights: WeightBytes, devices: int) -> WeightBytes:
    """What known weights of a decoder take on each device, as estimated ones would."""
    share, whole = estimate_weights(config, devices).plain, estimate_weights(config).plain
    return WeightBytes(*(-(-nbytes * share // whole) for nbytes in weights))


def cache_nbytes(config: Config, batch: int, context: int, devices: int = 1) -> int:
    """Bytes of keys, values and positions on each device."""
    share, slots = share_of(config, devices), _generate.cache_length(context, 1)
    cache = jax.eval_shape(functools.partial(_cache.init_cache, share, batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def estimate_temporary(
    config: Config, batch: int, context: int, prompt: int | None = None, devices: int = 1
) -> Temporary:
    """What a program takes beside weights and cache, as XLA plans it for a GPU.

    Args:
        config: of the decoder.
        batch: how many sequences.
        context: how many tokens the cache has room for.
        prompt: how many are read at once, at most; None for as many as `prefill` does.
        devices: how many the model is divided over.
    """
    c, width = share_of(config, devices), np.dtype(config.dtype).itemsize
    slots = _generate.cache_length(context, 1)
    rows = min(slots if prompt is None else prompt, max(1, _generate.PIECE_TOKENS // batch))
    tokens = batch * rows
    # Of a layer that attends to most of them: sliding ones look at new ones beside those in slots.
    window = min(slots, c.window)
    in_window = window if rows == 1 else window + rows
    keys = max(0 if all(c.sliding) else slots, in_window if any(c.sliding) else 0)

    def part(smallest: int, count: int) -> int:
        """Bytes of as many as attention looks at together."""
        return min(smallest * count, max(smallest, _attention.PART_BYTES))

    # Keys and values are copied for a key-value head of a row at least, scores computed for a token
    # and the query heads that share it.
    copied = part(2 * keys * c.head_dim * width, batch * c.kv_heads)
    scores = part(4 * c.heads // c.kv_heads * keys, tokens * c.kv_heads)
    # Scores are float32, the weights made of them are not.
    attention = scores + scores * width // 4 + 2 * width * tokens * c.heads * c.head_dim
    mlp = 2 * width * tokens * c.hidden
    in_block = Temporary(
        block=2 * sum(map(math.prod, _block_shapes(c))),
        head=0,
        cache_copy=copied,
        activations=2 * width * tokens * c.dim + max(attention, mlp),
    )
    in_head = Temporary(
        block=0,
        head=2 * _table.ROWS * c.dim * _head_groups(config, devices),
        cache_copy=0,
        activations=width * tokens * c.dim + 2 * 4 * batch * c.vocab,
    )
    return max(in_block, in_head, key=lambda temporary: temporary.nbytes)


def longest_context(config: Config, fits: Callable[[int], bool]) -> int:
    """The longest context that fits and that the model was made for; 0 if none does."""
    return _largest(fits, config.max_length)


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits; 0 if none does."""
    most = 1
    while most < MOST_SEQUENCES and fits(most):
        most *= 2
    return _largest(fits, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def _plain_bytes(nbytes: int) -> WeightBytes:
    return WeightBytes(nbytes, nbytes, nbytes, nbytes)


def _compressed_bytes(shape: tuple[int, ...], stack_axes: int) -> WeightBytes:
    """What a leaf takes of which each slice is compressed, unless that would be more than plain."""
    plain, slices = 2 * math.prod(shape), math.prod(shape[:stack_axes])
    view = _layout.make_view(shape[stack_axes:])
    fixed = _layout.HEADER_WORDS + _layout.CODEBOOK_WORDS + view.chunks + 1
    fixed += view.sign_mantissa_words
    return WeightBytes(
        plain,
        *(
            min(plain, 4 * slices * (fixed + 4 * math.ceil(view.size * bits / 128)))
            for bits in (EXPECTED_BITS, LEAST_BITS, MOST_BITS)
        ),
    )


@functools.lru_cache(maxsize=8)
def _block_shapes(config: Config) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(_transformer.block_shapes(config)))


def _table_share(config: Config, devices: int) -> tuple[int, int, int]:
    groups, rows, dim = table_shape(config, devices)
    return groups // devices, rows, dim


def _head_groups(config: Config, devices: int) -> int:
    table = jax.ShapeDtypeStruct(_table_share(config, devices), config.dtype)
    return _table.groups_in_piece(table)  # type: ignore[arg-type]  # its shape is enough
