"""Reads of a compressed tensor: while what was decompressed lives, it is the same array.

Some programs know a weight by the identity of the array that a module has read, and look for it
among what the module's parameters read as.
"""

import weakref

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

    def __init__(self, array: Compressed) -> None:
        self._hash = hash(tuple(map(id, array.payload)))
        self._parts = tuple(map(weakref.ref, array.payload))
        self._others = (array.layout, get_trace_state())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Source):
            return NotImplemented
        pairs = zip(self._parts, other._parts, strict=True)
        same = all(mine() is theirs() is not None for mine, theirs in pairs)
        return same and self._others == other._others


_living: weakref.WeakValueDictionary[_Source, Array] = weakref.WeakValueDictionary()


def read(array: Compressed) -> Array:
    """The decompressed tensor: the array of an earlier read in this trace, while that lives.

    So a parameter that is read twice in a traced function is decompressed once there.

    Raises:
        ValueError: its arrays do not fit each other.
    """
    source = _Source(array)
    found = _living.get(source)
    if found is not None and (isinstance(found, jax.core.Tracer) or not found.is_deleted()):
        return found
    try:
        check_stacks([array], ["tensor"])
    except ValueError as error:
        error.add_note(
            "df11_jax: the arrays inside of a compressed parameter are not as they were. If the "
            "model moves an axis of layers to the front, tell it that they are there already "
            "(MaxText: param_scan_axis=0)"
        )
        raise
    weights = _living[source] = decode_stacks([array], ["tensor"])[0]
    return weights
