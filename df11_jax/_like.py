"""Trees of the same shapes: what a leaf has to be so that programs for another one take it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._brief import brief
from df11_jax._decode import path_name
from df11_jax._layout import Layout
from df11_jax._leaves import is_array
from df11_jax._select import is_candidate_dtype
from df11_jax._stack import fit_exponents


class Form(NamedTuple):
    """What the shapes of a compressed leaf follow from, beside its stack axes.

    Attributes:
        layout: the layout of its slices.
        words: the length of `exponents`.
    """

    layout: Layout
    words: int

    @classmethod
    def of(cls, array: DF11Array) -> "Form":
        """The form of a compressed leaf, whose arrays may be shapes."""
        return cls(array.layout, array.exponents.shape[-1])

    def fit(self, array: DF11Array, path: str) -> DF11Array:
        """The same tensor in this form.

        Args:
            array: a compressed tensor of the same layout.
            path: the name of the leaf; errors have it.

        Raises:
            ValueError: its coded exponents are longer.
        """
        try:
            return fit_exponents(array, self.words)
        except ValueError as error:
            raise ValueError(
                f"{path}: does not fit into the shapes of like, which was made of weights that "
                f"compress better: {error}. Compress without like; programs are then compiled for "
                "the new shapes"
            ) from None


def forms_of(
    named: Sequence[tuple[str, Any]], treedef: Any, like: PyTree, *, cast: bool
) -> list[Form | None]:
    """The forms that leaves are to get: those of another tree.

    Args:
        named: paths and leaves.
        treedef: their tree.
        like: the other tree, whose leaves may be shapes.
        cast: whether float32 and float16 are rounded to bfloat16.

    Returns:
        A form for each leaf; None for those that are to be plain.

    Raises:
        ValueError: the trees differ, or a leaf is not what the other one is.
    """
    with_paths, expected = jax.tree.flatten_with_path(like, is_leaf=is_df11)
    if treedef != expected:
        found, wanted = {path for path, _ in named}, {path_name(path) for path, _ in with_paths}
        for path in sorted(found ^ wanted):
            there, missing = ("params", "like") if path in found else ("like", "params")
            raise ValueError(
                f"{path}: is in {there} and not in {missing}. Programs for like take trees that "
                "are the same: pass one, or compress without like"
            )
        raise ValueError(
            f"params has other containers than like: expected {brief(expected)}, got "
            f"{brief(treedef)}. Programs for like take trees that are the same"
        )
    targets = [target for _, target in with_paths]
    for (path, leaf), target in zip(named, targets, strict=True):
        check_is_like(path, leaf, target, cast=cast)
    return [Form.of(target) if is_df11(target) else None for target in targets]


def check_is_like(path: str, leaf: Any, target: Any, *, cast: bool) -> None:
    """Checks that a leaf can take the form of another one.

    Args:
        path: the name of the leaf; errors have it.
        leaf: the leaf, plain or compressed.
        target: the other one, whose arrays may be shapes.
        cast: whether float32 and float16 are rounded to bfloat16.

    Raises:
        ValueError: it cannot.
    """
    shape, dtype = np.shape(leaf), _dtype(leaf)
    expected, got = _describe(target), _describe(leaf)
    if shape != np.shape(target):
        hint = "it is of another model: compress without like"
    elif is_df11(leaf) and (not is_df11(target) or leaf.stack_shape != target.stack_shape):
        hint = "decompress it first"
    elif is_df11(leaf) and leaf.layout != target.layout:
        expected, got = f"{expected} of {target.layout}", f"{got} of {leaf.layout}"
        hint = "decompress it first"
    elif is_df11(target) and not (is_df11(leaf) or is_array(leaf)):
        hint = "pass the weights themselves"
    elif is_df11(target) and not is_candidate_dtype(dtype, cast):
        hint = "cast it first, or pass cast=True, if rounding is acceptable"
    elif (
        not is_df11(target)
        and dtype != _dtype(target)
        and _dtype_in_programs(leaf) != _dtype_in_programs(target)
    ):
        hint = "cast it first, or compress without like"
    else:
        return
    raise ValueError(f"{path}: expected {expected}, as in like, got {got}: {hint}")


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", type(leaf))


def _dtype_in_programs(leaf: Any) -> Any:
    """Of a number, or an array of a type that jax rounds to another, what programs see."""
    try:
        seen = jax.eval_shape(lambda x: x, leaf)
    except (TypeError, OverflowError):  # nothing that programs take
        return _dtype(leaf)
    return seen.dtype, seen.weak_type


def _describe(leaf: Any) -> str:
    if is_df11(leaf):
        return f"compressed {leaf.dtype}{list(leaf.shape)}, stacked along {len(leaf.stack_shape)}"
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else brief(leaf)
