"""Leaves of the pytrees that users pass: which are arrays, and what to say if they are not."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from df11_jax._array import is_df11
from df11_jax._brief import brief

FROM_TORCH = "jax.numpy.from_dlpack(tensor.detach())"

# What to pass in place of an object, by the package that its class comes from.
_INSTEAD = {
    "keras": "Of a Keras model pass the variables: {v.path: v for v in model.variables}",
    "torch": "Of torch pass arrays of JAX: "
    f"{{name: {FROM_TORCH} for name, tensor in module.state_dict().items()}}",
    "flax": "A linen module has no parameters: pass those that its init returned",
}


def as_array(leaf: Any) -> Any:
    """The array of JAX that a leaf stands for, such as a Keras variable; else the leaf itself."""
    if is_array(leaf) or is_df11(leaf) or not hasattr(type(leaf), "__jax_array__"):
        return leaf
    return leaf.__jax_array__()


def raw_value(leaf: Any) -> Any:
    """What a variable of nnx holds, which reads as the decompressed array; else the leaf itself."""
    return leaf.get_raw_value() if hasattr(leaf, "get_raw_value") else leaf


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of JAX, traced or not, or of numpy."""
    return isinstance(leaf, (jax.Array, np.ndarray))


def is_foreign(leaf: Any) -> bool:
    """Whether a leaf is an array of another library, such as a tensor of torch."""
    is_ours = is_array(leaf) or is_df11(leaf) or isinstance(leaf, np.generic)
    return not is_ours and hasattr(type(leaf), "__array__") and hasattr(leaf, "shape")


def plain_shape(leaf: Any) -> tuple[int, ...] | None:
    """The shape of an array; None for any other leaf."""
    return tuple(leaf.shape) if is_array(leaf) else None


def check_elements(path: str, leaf: Any) -> None:
    """Checks that the arrays of a leaf have elements that can be saved.

    Raises:
        ValueError: one is a shape alone, is traced, was deleted, or is masked, which would lose the
            mask; the message has the path.
    """
    for array in jax.tree.leaves(leaf):
        if isinstance(array, np.ma.MaskedArray):
            raise ValueError(f"{path}: expected an array, got a masked one: save array.filled(...)")
        if isinstance(array, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{path}: expected an array, got a ShapeDtypeStruct, which has no elements to be "
                "saved"
            )
        if isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"{path}: is traced, and has no elements before the function that is being traced "
                "runs: save what it returns"
            )
        if isinstance(array, jax.Array) and array.is_deleted():
            raise ValueError(
                f"{path}: was deleted, perhaps because it was donated to a function: save it "
                "before that, or save what the function returned"
            )


@contextlib.contextmanager
def naming(path: str, doing: str = "compressing") -> Iterator[None]:
    """Errors name the leaf: what numpy and jax raise (for deleted arrays, say) does not."""
    try:
        yield
    except Exception as error:
        error.add_note(f"df11_jax: while {doing} the leaf {path}")
        raise


def no_pytree(caller: str, found: Any) -> TypeError:
    """The error about what is neither a container nor an array, such as a model or a path.

    Args:
        caller: the name of the public function that got it.
        found: what it got.
    """
    what = type(found).__name__
    packages = [base.__module__.partition(".")[0] for base in type(found).__mro__]
    instead = [_INSTEAD[package] for package in packages if package in _INSTEAD]
    if isinstance(found, (str, os.PathLike)):
        what = brief(found)
        instead = ["df11_jax.checkpoints.load(path) compresses what lies there as it reads it"]
    return TypeError(
        f"{caller}: expected a pytree of arrays, such as a dict of them, got {what}. "
        + (instead or ["Pass the parameters themselves"])[0]
    )
