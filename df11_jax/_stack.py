"""Stacks of compressed tensors, put together from slices that were compressed one by one."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from df11_jax import _layout
from df11_jax._array import DF11Array
from df11_jax._host_arrays import empty_aligned
from df11_jax._host_codec import available_threads
from df11_jax._layout import Layout

_COPIED_WORDS = 2**20  # by a thread at a time


def stack(arrays: Sequence[DF11Array]) -> DF11Array:
    """Stacks compressed tensors along a new first axis, as `jax.numpy.stack` does it.

    Nothing is decompressed. Exponents are padded to those of the longest tensor.

    Args:
        arrays: tensors of the same shape, with the same stack axes; also traced ones.

    Returns:
        The stack, of shape `(len(arrays),) + arrays[0].shape`.

    Raises:
        TypeError: one of them is not a `DF11Array`.
        ValueError: `arrays` is empty, or their shapes differ.
    """
    if not arrays:
        raise ValueError("stack needs at least one DF11Array")
    first = arrays[0]
    for i, array in enumerate(arrays):
        if not isinstance(array, DF11Array):
            raise TypeError(f"arrays[{i}]: expected a DF11Array, got {type(array).__name__}")
        if (array.stack_shape, array.layout) != (first.stack_shape, first.layout):
            raise ValueError(f"arrays[{i}]: expected a tensor like {first!r}, got {array!r}")
    return jax.tree.map(lambda *parts: jnp.stack(parts), *pad_exponents(arrays))


def pad_exponents(arrays: Sequence[DF11Array]) -> list[DF11Array]:
    """The same tensors, whose arrays of exponents are as long as that of the longest."""
    longest = max(array.exponents.shape[-1] for array in arrays)
    return [fit_exponents(array, longest) for array in arrays]


def fit_exponents(array: DF11Array, words: int) -> DF11Array:
    """The same tensor, where it was, with an array of exponents of another length.

    Args:
        array: a tensor or a stack; its arrays may be traced, or on the host, which they stay.
        words: the length, a multiple of 4.

    Raises:
        ValueError: the coded exponents are longer.
    """
    exponents = array.exponents
    missing = words - exponents.shape[-1]
    if not missing:
        return array
    if missing < 0:
        offsets = array.chunk_offsets
        if not getattr(offsets, "is_fully_addressable", True):
            offsets = multihost_utils.process_allgather(offsets, tiled=True)
        used = _layout.round_up(int(np.asarray(offsets)[..., -1].max(initial=0)), 4)
        if used > words:
            raise ValueError(f"{used:,} words of coded exponents, and room for {words:,}")
    if isinstance(exponents, np.ndarray):
        fitted = _resize(exponents, words, np.pad)
    elif isinstance(exponents, jax.core.Tracer):
        fitted = _resize_on_device(exponents, words)
    else:
        where = exponents.sharding
        near = next(iter(exponents.devices())).default_memory().kind  # in which programs compute
        if where.memory_kind != near:
            exponents = jax.device_put(exponents, where.with_memory_kind(near))
        fitted = _resize_on_device(exponents, words)
        if fitted.sharding != where:
            fitted = jax.device_put(fitted, where)
    return dataclasses.replace(array, exponents=fitted)


def _resize(exponents: Any, words: int, pad: Callable[..., Any]) -> Any:
    room = [(0, 0)] * (exponents.ndim - 1) + [(0, max(words - exponents.shape[-1], 0))]
    return pad(exponents[..., :words], room)


# Under jit, where zeros are no transfers: users may forbid these (`jax.transfer_guard`).
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _resize_on_device(exponents: UInt32[Array, "*rows _"], words: int) -> Array:
    return _resize(exponents, words, jnp.pad)


class StackBuilder:
    """Assembles a stack on the host, from slices that come in any order.

    Beside the stack, the host holds the exponents a second time for a moment: the length to which
    they are padded is not known before all slices are there.
    """

    def __init__(self, stack_shape: tuple[int, ...], layout: Layout) -> None:
        """Makes room.

        Args:
            stack_shape: the axes of the stack; slices are counted over all of them.
            layout: the layout of each slice; it is not divided.
        """
        view = layout.view
        length = math.prod(stack_shape)
        words = (_layout.HEADER_WORDS, _layout.CODEBOOK_WORDS, view.chunks + 1)
        self._stack_shape = stack_shape
        self._layout = layout
        self._others = [
            empty_aligned((length, count), np.uint32)
            for count in (*words, view.sign_mantissa_words)
        ]
        self._exponents: list[UInt32[np.ndarray, " words"] | None] = [None] * length

    def put(self, start: int, payload: Sequence[UInt32[np.ndarray, "slices words"]]) -> None:
        """Adds slices `start, start + 1, ...`.

        Args:
            start: the index of the first one in the stack.
            payload: the five arrays of these slices, with one stack axis.
        """
        *words, exponents, sign_mantissa = payload
        for place, slices in zip(self._others, (*words, sign_mantissa), strict=True):
            _copy(place[start : start + len(slices)], slices)
        for i, row in enumerate(exponents):
            self._exponents[start + i] = row

    def longest(self) -> int:
        """The words of the longest array of exponents.

        Raises:
            ValueError: a slice is missing.
        """
        rows = [row for row in self._exponents if row is not None]
        if len(rows) < len(self._exponents):
            raise ValueError(f"the stack has {len(rows)} of {len(self._exponents)} slices")
        return max(map(len, rows), default=0)

    def build(
        self,
        put: Callable[[UInt32[np.ndarray, "..."]], jax.Array] = jax.device_put,
        words: int | None = None,
    ) -> DF11Array:
        """The stack. This empties the builder.

        Args:
            put: a function that puts an array onto its device or devices.
            words: the length of the arrays of exponents; None for the longest that there is.

        Raises:
            ValueError: a slice is missing.
        """
        words = max(self.longest(), words or 0)
        rows = [row for row in self._exponents if row is not None]
        self._exponents.clear()
        exponents = empty_aligned((len(rows), words), np.uint32)
        for place in reversed(exponents):
            row = rows.pop()
            _copy(place[: len(row)], row)
            place[len(row) :] = 0

        def put_stack(array: UInt32[np.ndarray, "slices words"]) -> jax.Array:
            return put(array.reshape(*self._stack_shape, array.shape[-1]))

        # One by one, and each freed: a device that is not the host gets copies.
        sign_mantissa = put_stack(self._others.pop()).block_until_ready()
        header, codebook, chunk_offsets = map(put_stack, self._others)
        payload = (header, codebook, chunk_offsets, put_stack(exponents), sign_mantissa)
        return DF11Array.from_payload(payload, self._layout)


def _copy(
    target: UInt32[np.ndarray, "*rows words"], source: UInt32[np.ndarray, "*rows words"]
) -> None:
    """Copies words by all threads: most of the time is that of the system, for new memory."""
    begins = range(0, source.shape[-1], _COPIED_WORDS)
    parts = [np.s_[..., begin : begin + _COPIED_WORDS] for begin in begins]
    if len(parts) < 2:
        target[:] = source
        return
    with ThreadPoolExecutor(min(len(parts), available_threads())) as pool:
        list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
