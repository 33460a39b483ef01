"""Reads of a compressed tensor: while what was decompressed lives, it is the same array.

Some programs know a weight by the identity of the array that a module has read, and look for it
among what the module's parameters read as. Products know by it what they can read instead.
"""

import weakref
from typing import Any

import jax
import jax.extend
from jaxtyping import Array

from df11_jax._slices import Compressed, check_stacks, decode_stacks

# `jax.core` has it in versions before 0.10.
get_trace_state = getattr(jax.extend.core, "get_opaque_trace_state", None) or (
    jax.core.get_opaque_trace_state
)


class _Source:
    """What was read, and in which trace; nothing of it is kept alive for this."""

    def __init__(self, compressed: Any) -> None:
        arrays, treedef = jax.tree.flatten(compressed)
        self._hash = hash(tuple(map(id, arrays)))
        self._arrays = tuple(map(weakref.ref, arrays))
        self._others = (treedef, get_trace_state())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Source):
            return NotImplemented
        pairs = zip(self._arrays, other._arrays, strict=True)
        same = all(mine() is theirs() is not None for mine, theirs in pairs)
        return same and self._others == other._others

    def compressed(self) -> Any:
        """What was read; None if its arrays are gone."""
        arrays = [array() for array in self._arrays]
        if any(array is None for array in arrays):
            return None
        return jax.tree.unflatten(self._others[0], arrays)


_living: weakref.WeakValueDictionary[_Source, Array] = weakref.WeakValueDictionary()
_sources: dict[int, _Source] = {}  # of what lives, by its `id`


def read(compressed: Any) -> Array:
    """The decompressed tensor: the array of an earlier read in this trace, while that lives.

    So a parameter that is read twice in a traced function is decompressed once there.

    Args:
        compressed: a `DF11Array`, or a `DF11Slice` whose index is a JAX array.

    Raises:
        ValueError: its arrays do not fit each other.
    """
    source = _Source(compressed)
    found = _living.get(source)
    if found is not None and (isinstance(found, jax.core.Tracer) or not found.is_deleted()):
        return found
    stack = stack_of(compressed)
    try:
        check_stacks([stack], ["tensor"])
    except ValueError as error:
        error.add_note(
            "df11_jax: the arrays inside of a compressed parameter are not as they were. If the "
            "model moves an axis of layers to the front, tell it that they are there already "
            "(MaxText: param_scan_axis=0)"
        )
        raise
    is_slice = stack is not compressed
    weights = compressed.__jax_array__() if is_slice else decode_stacks([stack], ["tensor"])[0]
    _living[source], _sources[id(weights)] = weights, source
    weakref.finalize(weights, _sources.pop, id(weights), None)
    return weights


def stack_of(compressed: Any) -> Compressed:
    """The stack that a `DF11Slice` is of; a `DF11Array` itself."""
    return getattr(compressed, "stack", compressed)


def source_of(weights: Any) -> Any:
    """The `DF11Array` or `DF11Slice` that an array was read from; None if it is no such array."""
    source = _sources.get(id(weights))
    if source is None or _living.get(source) is not weights:
        return None
    return source.compressed()
