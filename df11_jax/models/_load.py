"""Loading parameters tensor by tensor, each compressed as it arrives."""

import collections
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import BFloat16

from df11_jax._bits import first_difference
from df11_jax._files.source import TensorInfo, TensorSource
from df11_jax._host_arrays import BFLOAT16
from df11_jax._host_codec import available_threads
from df11_jax._progress import ProgressBar
from df11_jax.models import _table
from df11_jax.models._config import Config
from df11_jax.models._leaf_builders import (
    CompressedLeaf,
    Leaf,
    PlainLeaf,
    is_candidate_stack,
    transpose,
)
from df11_jax.models._placement import Devices, Placement
from df11_jax.models._shares import cut, part_shape, table_shape
from df11_jax.models._transformer import Params
from df11_jax.models._weights import Slot, find_slots, find_tied_head, nest


def load_params(
    source: TensorSource,
    config: Config,
    *,
    compress: bool = True,
    cast: bool = False,
    verify: bool = True,
    progress: bool = False,
    threads: int | None = None,
    devices: Devices | None = None,
) -> Params:
    """Loads the parameters of a decoder.

    Tensors are read and compressed one by one, so that beside the result the host holds what a
    few of them need.

    Args:
        source: has the tensors, under Hugging Face's names.
        config: of the decoder.
        compress: False for plain bfloat16 parameters.
        cast: round float32 and float16 tensors to bfloat16, which is not lossless.
        verify: decode each tensor and compare it bit by bit before going on.
        progress: show a progress bar, in bytes.
        threads: how many threads to use; None for all that this process may run on.
        devices: to divide them over, or how many of this host; None for the default device alone.

    Returns:
        Parameters for `generate`; those on a single device, for `forward`, too.

    Raises:
        ValueError: a tensor is missing, not known, not bfloat16, or of another shape than it
            should have; a tied head is not the embedding; there are not as many devices, or the
            decoder cannot be divided among them.
        RuntimeError: verification failed. All errors name the tensor.
    """
    place = Placement(config, devices)
    slots = find_slots(source.tensors, config)
    for name, slot in slots.items():
        _check(name, slot, source.tensors[name], cast)
    if head := find_tied_head(source.tensors, config):
        _check_tied_head(head, source, slots, cast)

    leaves: dict[tuple[str, ...], Leaf] = {}
    for path, shape in {
        slot.path: _leaf_shape(slot, config, place.count) for slot in slots.values()
    }.items():
        if compress and is_candidate_stack(shape):
            leaves[path] = CompressedLeaf(shape, verify, threads)
        else:
            leaves[path] = PlainLeaf(shape)
    threads = threads or available_threads()
    to_come = collections.Counter(slot.path for slot in slots.values())
    total = sum(2 * math.prod(slot.shape) for slot in slots.values())
    params: dict[tuple[str, ...], Any] = {}
    with ProgressBar("load", total, show=progress) as bar, ThreadPoolExecutor(threads) as pool:
        for name in (name for name in source.tensors if name in slots):
            slot = slots[name]
            tensor = source.read(name).astype(BFLOAT16, copy=False)
            for start, slices in _slices(slot, tensor, pool, config, place.count):
                leaves[slot.path].put(start, slices, name)
            bar.update(name, tensor.nbytes)
            del tensor, slices
            to_come[slot.path] -= 1
            if not to_come[slot.path]:
                # At once, so that what only building needs is not held for all leaves.
                params[slot.path] = leaves.pop(slot.path).build(place.of(slot.path))
    return nest(params)


def _check(name: str, slot: Slot, info: TensorInfo, cast: bool) -> None:
    if tuple(info.shape) != slot.shape:
        raise ValueError(f"{name}: expected shape {list(slot.shape)}, got {list(info.shape)}")
    castable = info.dtype in ("F32", "F16")
    if info.dtype != "BF16" and not (cast and castable):
        hint = ": ask for cast=True (--cast) if rounding is acceptable" if castable else ""
        raise ValueError(f"{name}: expected BF16, got {info.dtype}{hint}")


def _check_tied_head(
    head: str, source: TensorSource, slots: Mapping[str, Slot], cast: bool
) -> None:
    """Versions of transformers disagree about a tied head that is not the embedding: refuse it."""
    embedding, slot = next((name, slot) for name, slot in slots.items() if slot.is_table)
    _check(head, slot, source.tensors[head], cast)
    both = (source.read(name).astype(BFLOAT16, copy=False) for name in (embedding, head))
    if difference := first_difference(*both):
        raise ValueError(
            f"{head} is not {embedding}, although tie_word_embeddings says so: {difference}. Set "
            "tie_word_embeddings to false in config.json if it is the head, else remove it"
        )


def _leaf_shape(slot: Slot, config: Config, devices: int) -> tuple[int, ...]:
    if slot.is_table:
        return table_shape(config, devices)
    if slot.layer is None:
        return slot.shape
    parts, shape = part_shape(slot.shape, slot.path, devices)
    return (parts * config.layers, *shape[::-1])


def _slices(
    slot: Slot,
    tensor: BFloat16[np.ndarray, "..."],
    pool: Executor,
    config: Config,
    devices: int,
) -> Iterator[tuple[int, BFloat16[np.ndarray, "slices ..."]]]:
    """The slices of its leaf that a tensor gives, in contiguous arrays, with their places."""
    if slot.is_table:
        if whole := len(tensor) // _table.ROWS:
            yield 0, tensor[: whole * _table.ROWS].reshape(whole, _table.ROWS, -1)
        if rest := len(tensor) % _table.ROWS:
            yield whole, np.pad(tensor[-rest:], ((0, _table.ROWS - rest), (0, 0)))[None]
        begin = -(-len(tensor) // _table.ROWS)
        groups = table_shape(config, devices)[0]
        if begin < groups:
            yield begin, np.zeros((groups - begin, _table.ROWS, tensor.shape[1]), BFLOAT16)
    elif slot.layer is None:
        yield 0, tensor
    else:
        for i, part in enumerate(cut(tensor, slot.path, devices)):
            part = transpose(part, pool) if slot.is_kernel else part
            yield i * config.layers + slot.layer, part[None]
