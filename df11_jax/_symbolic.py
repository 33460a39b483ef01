"""Dimensions of programs that are exported for any number of something."""

from collections.abc import Callable

import jax


def holds(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds; False if that depends on a dimension that is not known yet."""
    try:
        return bool(condition())
    except jax.errors.InconclusiveDimensionOperation:
        return False
