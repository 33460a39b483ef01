"""Dimensions of programs that are exported for any number of something."""

from collections.abc import Callable

try:
    from jax.errors import InconclusiveDimensionOperation
except ImportError:  # jax 0.9
    from jax.core import InconclusiveDimensionOperation


def holds(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds; False if that depends on a dimension that is not known yet."""
    try:
        return bool(condition())
    except InconclusiveDimensionOperation:
        return False
