"""Formulas for the memory that generation takes on each device.

They need a configuration only: nothing is read from files or compiled. Whether a model fits on a
device, by these formulas, is found out in `fit`.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from df11_jax import _layout
from df11_jax._files.source import TensorInfo
from df11_jax._layout import Layout, make_layout
from df11_jax._select import is_candidate
from df11_jax._take import rows_in_piece
from df11_jax.models import _attention, _cache, _experts, _programs, _transformer
from df11_jax.models._config import Config
from df11_jax.models._layer_types import (
    LayerType,
    count_stack,
    layer_types,
    type_config,
)
from df11_jax.models._leaf_builders import count_stack_axes, is_candidate_leaf, slice_layout
from df11_jax.models._memory import Memory
from df11_jax.models._sharding import is_wide, shard_config, table_shape
from df11_jax.models.prompts import cache_length

# Bits of the coded exponent of a weight; the rest of a compressed tensor follows from its shape.
# Normally distributed weights take the least, the matrices of trained models what is expected, and
# none that was measured takes the most.
LEAST_BITS, EXPECTED_BITS, MOST_BITS = 2.62, 2.70, 2.82


class WeightBytes(NamedTuple):
    """The bytes that weights take.

    Attributes:
        plain: their bytes without compression.
        compressed: their bytes when compressed, known exactly or as expected.
        least, most: the limits within which the expected bytes may lie; equal to `compressed` if
            these are known exactly.
    """

    plain: int
    compressed: int
    least: int
    most: int

    def in_proportion(self, part: int, whole: int) -> "WeightBytes":
        """Those of a part, in proportion to bytes of plain weights."""
        return WeightBytes(*(-(-nbytes * part // whole) for nbytes in self))

    @property
    def exact(self) -> bool:
        """Whether the bytes of the compressed weights are known exactly."""
        return self.least == self.most


class Temporary(NamedTuple):
    """The bytes beside weights and cache at the peak, which is in a block or in the output head.

    Attributes:
        block: the decompressed weights of a block; 0 if the peak is in the head.
        head: the piece of the output head that is decompressed at a time; 0 if the peak is in a
            block.
        cache_copy: the part of the cache that XLA copies.
        activations: everything else.
    """

    block: int
    head: int
    cache_copy: int
    activations: int

    @property
    def nbytes(self) -> int:
        """All of these bytes."""
        return sum(self)


def estimate_memory(
    config: Config,
    *,
    batch: int,
    context: int,
    compress: bool = True,
    devices: int = 1,
    stages: int = 1,
) -> Memory:
    """Estimates the result of `measure_memory`, without compiling anything.

    Weights are expected to compress like those of trained models. Temporary memory is that of the
    programs as XLA plans them for a GPU, rather too high than too low. Plain weights are assumed to
    need as much of it as compressed ones, since XLA copies them out of their stacks, often a block
    at a time.

    Args:
        config: the configuration of the transformer.
        batch: the number of sequences.
        context: the number of tokens of each sequence in the cache, read or generated.
        compress: False for plain weights.
        devices: the number of devices that the model is divided over.
        stages: the number of stages that layers and devices are divided into.

    Returns:
        Bytes on each device.

    Raises:
        ValueError: the context is longer than the model allows, a number is less than 1, or the
            model cannot be divided among the devices.
    """
    check_sizes(config, batch, context, devices, stages)
    weights = estimate_weights(config, devices, stages)
    divided = {"devices": devices, "stages": stages}
    return Memory(
        weights=weights.compressed if compress else weights.plain,
        plain_weights=weights.plain,
        cache=cache_nbytes(config, batch, context, **divided),
        prefill=estimate_temporary(config, batch, context, **divided).nbytes,
        decode=estimate_temporary(config, batch, context, prompt=1, **divided).nbytes,
    )


def check_sizes(
    config: Config, batch: int, context: int, devices: int = 1, stages: int = 1
) -> None:
    """Raises ValueError if the model cannot run with these sizes."""
    sizes = {"batch": batch, "context": context, "devices": devices, "stages": stages}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if context > config.max_length:
        raise ValueError(
            f"context is {context}, but the model was made for {config.max_length} positions"
        )
    shard_config(config, devices, stages)


@functools.lru_cache(maxsize=8)
def estimate_weights(config: Config, devices: int = 1, stages: int = 1) -> WeightBytes:
    """The bytes on each device of the parameters that `load_params` returns."""
    leaves = _leaves(shard_config(config, devices, stages))
    tables_ = _table_shards(config, devices)
    return sum_weights(
        [_plain_bytes(2 * size) for size in _vectors(config)]
        + [
            _compressed_bytes(math.prod(shape[: count_stack_axes(path)]), slice_layout(path, shape))
            if is_candidate_leaf(path, shape)
            else _plain_bytes((4 if is_wide(path) else 2) * math.prod(shape))
            for path, shape in [*leaves, *tables_]
        ]
    )


def estimate_tensors(tensors: Iterable[TensorInfo]) -> WeightBytes:
    """The bytes of tensors that are compressed one by one."""
    return sum_weights(
        _compressed_bytes(1, make_layout(tensor.shape))
        if is_candidate(tensor.shape, tensor.numpy_dtype)
        else _plain_bytes(tensor.nbytes)
        for tensor in tensors
    )


def sum_weights(parts: Iterable[WeightBytes]) -> WeightBytes:
    """The sum of the bytes of several weights."""
    return WeightBytes(*map(sum, zip(WeightBytes(0, 0, 0, 0), *parts, strict=True)))


def count_parameters(config: Config) -> int:
    """The number of weights of the model."""
    in_tables = (1 if config.tied else 2) * config.vocab * config.dim
    if config.per_layer is not None:
        in_tables += config.per_layer.vocab * config.layers * config.per_layer.dim
    in_layers = sum(math.prod(shape) for _, shape in _leaves(config))
    return in_layers + sum(_vectors(config)) + in_tables


def shard_weights(
    config: Config, weights: WeightBytes, devices: int, stages: int = 1
) -> WeightBytes:
    """The bytes on each device of known weights, in proportion to the estimated plain weights."""
    shard, whole = estimate_weights(config, devices, stages).plain, estimate_weights(config).plain
    return weights.in_proportion(shard, whole)


def cache_nbytes(
    config: Config, batch: int, context: int, devices: int = 1, stages: int = 1
) -> int:
    """Bytes of keys, values and positions on each device."""
    shard, slots = shard_config(config, devices, stages), cache_length(context, 1)
    return _cache.count_bytes(
        jax.eval_shape(functools.partial(_cache.init_cache, shard, batch, slots))
    )


def estimate_temporary(
    config: Config,
    batch: int,
    context: int,
    prompt: int | None = None,
    devices: int = 1,
    stages: int = 1,
) -> Temporary:
    """The memory of a program beside weights and cache, as XLA plans it for a GPU.

    Args:
        config: the configuration of the transformer.
        batch: the number of sequences.
        context: the number of tokens that the cache has room for.
        prompt: the most tokens of a sequence that are read at once; None for as many as `prefill`
            reads.
        devices: the number of devices that the model is divided over.
        stages: the number of stages that layers and devices are divided into.
    """
    c, width = shard_config(config, devices, stages), np.dtype(config.dtype).itemsize
    slots = cache_length(context, 1)
    seq = min(slots if prompt is None else prompt, max(1, _programs.PIECE_TOKENS // batch))
    in_blocks = [
        _in_block(c, type_, batch, seq, slots) for type_ in dict.fromkeys(layer_types(config))
    ]
    in_head = Temporary(
        block=0,
        head=_head_nbytes(config, devices),
        cache_copy=0,
        activations=width * batch * seq * c.dim + 2 * 4 * batch * c.vocab,
    )
    return max(*in_blocks, in_head, key=lambda temporary: temporary.nbytes)


def _in_block(config: Config, type_: LayerType, batch: int, seq: int, slots: int) -> Temporary:
    """The memory beside weights and cache in a block of a type."""
    c, width, tokens = type_config(config, type_), np.dtype(config.dtype).itemsize, batch * seq

    def part(smallest: int, count: int) -> int:
        """The bytes that attention handles at a time, of a number of smallest parts."""
        return min(smallest * count, max(smallest, _attention.PART_BYTES))

    beside = 0
    if c.per_layer is not None:
        beside += width * tokens * c.layers * c.per_layer.dim
    if c.shared_layers and seq > 1:
        # The keys and values that the layers at the end attend to.
        new = min(slots, c.window) + seq
        beside += 2 * width * batch * new * config.kv_heads * config.head_dim
    copied = 0
    if c.delta_rule is not None and type_ == "linear":
        rule = c.delta_rule
        # XLA copies the states of the layer; before a loop over chunks, it does so twice.
        states = 4 * batch * rule.value_heads * rule.key_dim * rule.value_dim
        mixing = 2 * width * tokens * rule.channels + states * (1 if seq == 1 else 2)
    else:
        # The most keys that a layer attends to: in sliding layers, those of the slots and the new
        # ones.
        window = min(slots, c.window)
        keys = slots if "full" in type_ else window if seq == 1 else window + seq
        # The smallest part of keys and values is that of a key-value head of a row; the smallest
        # part of the scores is that of a token and the query heads that share a key-value head.
        copied = part(2 * keys * c.head_dim * width, batch * c.kv_heads)
        scores = part(4 * c.heads // c.kv_heads * keys, tokens * c.kv_heads)
        # Scores are float32; the attention weights computed from them have the dtype of
        # activations.
        mixing = scores + scores * width // 4 + 2 * width * tokens * c.heads * c.head_dim
    mlp = 2 * width * tokens * c.hidden
    # The weights of a layer of the type, by path.
    sizes = {
        path: 2 * math.prod(shape[1:])
        for path, shape in _leaves(config)
        if path[1] == type_ or not config.layers_differ
    }
    block = sum(sizes.values())
    if c.experts.count:
        # Other weights than those of the MLP are not needed any more when experts are decompressed.
        others = sum(size for path, size in sizes.items() if "mlp" not in path)
        shared = sum(size for path, size in sizes.items() if "shared_expert" in path)
        block = shared + max(others, _experts.group_nbytes(c, tokens))
        mlp = 2 * width * tokens * c.experts.shared_hidden + _experts.activation_nbytes(c, tokens)
    return Temporary(
        block=block,
        head=0,
        cache_copy=copied,
        activations=2 * width * tokens * c.dim + max(mixing, mlp) + beside,
    )


def _plain_bytes(nbytes: int) -> WeightBytes:
    return WeightBytes(nbytes, nbytes, nbytes, nbytes)


def _compressed_bytes(slices: int, layout: Layout) -> WeightBytes:
    """The bytes of a leaf whose slices are compressed, or of a plain one if that is smaller."""
    view = layout.view
    plain = 2 * slices * view.size
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
def _leaves(config: Config) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """The paths and shapes of the leaves of all layers, which are stacks."""
    found = []
    for keys, leaf in jax.tree.leaves_with_path(_transformer.block_shapes(config)):
        path = ("layers", *(key.key for key in keys))
        found.append((path, (count_stack(path, config), *leaf.shape)))
    return tuple(found)


def _vectors(config: Config) -> list[int]:
    """The sizes of the vectors outside of the layers."""
    return [config.dim, *([config.per_layer.dim] if config.per_layer else [])]


def _table_shards(config: Config, devices: int) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The paths and shapes of each device's shards of the tables."""
    names = ["embed_tokens"] if config.tied else ["embed_tokens", "lm_head"]
    if config.per_layer is not None:
        names.append("embed_tokens_per_layer")
    shapes = {name: table_shape(config, devices, name) for name in names}
    return [((name,), (1, *shape[1:])) for name, shape in shapes.items()]


def _head_nbytes(config: Config, devices: int) -> int:
    """The bytes of the rows of the output head that are decompressed at a time."""
    shape = dict(_table_shards(config, devices))[("embed_tokens" if config.tied else "lm_head",)]
    return 2 * rows_in_piece(*shape[1:]) * shape[2]
