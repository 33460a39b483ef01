"""Python's numbers, which are stored with 64 bits, for targets of other dtypes of their kind.

A train state is made with `step=0`, and `jax.eval_shape` of that has an int32 there. The other way
round, numbers and texts in a target tell the kind of what is stored, and no more.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from df11_jax._array import is_df11
from df11_jax.orbax._manifest import StoredLeaf

# The dtypes with which they are stored, and what targets may have.
_KINDS: dict[str | None, Any] = {
    "bool": jnp.bool_,
    "int64": jnp.integer,
    "float64": jnp.floating,
}
# What numbers of targets may stand for. A bool is an int to Python, so it comes first.
_TYPES: dict[type, Any] = {
    bool: jnp.bool_,
    int: jnp.integer,
    float: jnp.floating,
    complex: jnp.complexfloating,
}


def is_scalar(leaf: StoredLeaf) -> bool:
    """Whether a leaf was a number of Python or of numpy, or an array of one on the host."""
    is_on_host = leaf.shape == () and leaf.shardings == (None,)
    return is_on_host and leaf.dtype is not None and not leaf.is_key


def is_number(leaf: StoredLeaf) -> bool:
    """Whether a leaf was a bool, an int or a float; or one of numpy's that is no other than it."""
    return is_scalar(leaf) and leaf.dtype in _KINDS


def as_saved(value: Any, leaf: StoredLeaf) -> Any:
    """A number as it was saved: Orbax stores numpy's scalars, of any dtype, as Python's numbers.

    Programs take these for other types: a float32 and a bfloat16 make a float32, but a float of
    Python and a bfloat16 make a bfloat16.

    Args:
        value: the leaf, as Orbax has read it.
        leaf: its description.
    """
    if is_number(leaf) or not isinstance(value, (bool, int, float)) or leaf.dtype is None:
        return value
    return np.dtype(leaf.dtype).type(value)


def agrees(leaf: StoredLeaf, target: Any) -> bool:
    """Whether a leaf is a number, and the target has an array of its kind."""
    if not is_number(leaf) or is_df11(target) or not hasattr(target, "dtype"):
        return False
    return jnp.issubdtype(target.dtype, _KINDS[leaf.dtype])


def is_of_kind(leaf: StoredLeaf, target: Any) -> bool:
    """Whether a leaf is of the kind of a target without a dtype: a text, or one of the numbers."""
    if leaf.dtype is None or isinstance(target, str):
        return leaf.dtype is None and isinstance(target, str)
    kind = next((kind for type_, kind in _TYPES.items() if isinstance(target, type_)), None)
    return kind is not None and not leaf.is_key and jnp.issubdtype(np.dtype(leaf.dtype), kind)


def as_array(value: Any, dtype: Any, name: str) -> np.ndarray:
    """A number that was read as an array of the target's dtype. Floats are rounded.

    Args:
        value: the number.
        dtype: the dtype of the target.
        name: the name of the leaf, for messages.

    Raises:
        ValueError: the number is out of range.
    """
    with np.errstate(over="ignore"):
        array = np.asarray(value).astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        fits = int(array) == int(value)
    else:
        fits = bool(np.isfinite(array)) or not np.isfinite(value)
    if not fits:
        raise ValueError(f"{name}: {value} is stored, which the target's {dtype} cannot hold")
    return array
