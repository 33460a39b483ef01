"""The rule for what is compressed and kept, and what to say if dtypes keep all leaves from it."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax import _layout
from df11_jax._array import is_df11
from df11_jax._brief import brief
from df11_jax._host_arrays import BFLOAT16
from df11_jax._units import format_bytes

_CASTABLE = (np.dtype(np.float32), np.dtype(np.float16))

# Below this size, a leaf saves less than its table takes.
MIN_SIZE = 16384


def is_candidate(
    shape: Sequence[int],
    dtype: Any,
    *,
    stack_axes: int = 0,
    min_size: int = MIN_SIZE,
    cast: bool = False,
) -> bool:
    """Whether a tensor is to be compressed, if that makes it smaller.

    It has to be bfloat16, large enough, and of no more dimensions than the format can hold.

    Args:
        shape: the shape of the tensor, stack axes included.
        dtype: its dtype; None for one that numpy lacks.
        stack_axes: the number of its leading axes that are a stack.
        min_size: the number of weights that it has at least, those of all slices together.
        cast: whether float32 and float16 are rounded to bfloat16.
    """
    return (
        is_candidate_dtype(dtype, cast)
        and math.prod(shape) >= min_size
        and len(shape) - stack_axes <= _layout.MAX_DIMS
    )


def is_candidate_dtype(dtype: Any, cast: bool) -> bool:
    """Whether tensors of a dtype can be compressed: the part of the rule that is about it."""
    return dtype == BFLOAT16 or (cast and is_castable(dtype))


def is_castable(dtype: Any) -> bool:
    """Whether a dtype is one that is rounded to bfloat16 on request."""
    return host_dtype(dtype) in _CASTABLE


def is_worth_keeping(compressed_nbytes: int, nbytes: int) -> bool:
    """Whether a compressed tensor is kept: it is smaller than the tensor that it came from."""
    return compressed_nbytes < nbytes


@dataclasses.dataclass(frozen=True)
class Selection:
    """The leaves of a pytree that are to be compressed: the rule, and the user's wishes.

    Attributes:
        include: a pattern to be found in their paths; None for all.
        stacked: a pattern that is found in the paths of stacks; None if there are none.
        predicate: a function of path and leaf, which may refuse leaves that the rest admits; None
            for none.
        min_size: the number of weights that they have at least.
        cast: whether float32 and float16 leaves are among them.
    """

    include: re.Pattern[str] | None = None
    stacked: re.Pattern[str] | None = None
    predicate: Callable[[str, Any], bool] | None = None
    min_size: int = MIN_SIZE
    cast: bool = False

    @classmethod
    def from_options(
        cls,
        *,
        include: str | None = None,
        stacked: str | None = None,
        predicate: Callable[[str, Any], bool] | None = None,
        min_size: int = MIN_SIZE,
        cast: bool = False,
        **_others: Any,
    ) -> Self:
        """The leaves that `compress_params` compresses if it is called with these options.

        Raises:
            TypeError: `include` or `stacked` is not a string.
            ValueError: one of them is not a regular expression.
        """
        patterns = _compile_pattern("include", include), _compile_pattern("stacked", stacked)
        return cls(*patterns, predicate, min_size, cast)

    def stack_axes(self, path: str) -> int:
        """The number of stack axes of a leaf."""
        return 1 if self.stacked is not None and self.stacked.search(path) else 0

    def admits(self, path: str, shape: Sequence[int], dtype: Any) -> bool:
        """Whether a leaf is one of them by all that does not need its elements."""
        return is_candidate(
            shape,
            dtype,
            stack_axes=self.stack_axes(path),
            min_size=self.min_size,
            cast=self.cast,
        ) and (self.include is None or self.include.search(path) is not None)

    def has(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is one of them."""
        return (
            isinstance(leaf, (jax.Array, np.ndarray))
            and self.admits(path, leaf.shape, leaf.dtype)
            and (self.predicate is None or self.predicate(path, leaf))
        )

    def would_have(self, path: str, leaf: Any) -> bool:
        """Whether a leaf would be one of them if it were bfloat16, and is not."""
        return (
            isinstance(leaf, (jax.Array, np.ndarray))
            and not is_candidate_dtype(leaf.dtype, self.cast)
            and dataclasses.replace(self, cast=True).has(path, leaf)
        )

    def warn_if_futile(
        self, caller: str, leaves: Iterable[tuple[str, Any]], *, stacklevel: int
    ) -> None:
        """Warns if no leaf is compressed, and some would be if they were bfloat16.

        Args:
            caller: the name of the public function that compressed.
            leaves: paths, and the leaves that came of compression.
            stacklevel: the one of `warnings.warn`, counted from the caller of this method.
        """
        leaves = list(leaves)
        if any(is_df11(leaf) for _, leaf in leaves):
            return
        missed = [leaf for path, leaf in leaves if self.would_have(path, leaf)]
        if not missed:
            return
        types = " or ".join(sorted({str(host_dtype(leaf.dtype)) for leaf in missed}))
        count, verb = (f"{len(missed):,} leaves", "are") if len(missed) > 1 else ("1 leaf", "is")
        size = format_bytes(sum(leaf.nbytes for leaf in missed))
        warnings.warn(
            f"{caller} compressed nothing: only bfloat16 is, and {count} ({size}) {verb} "
            f"{types}. Make them bfloat16 (Flax: param_dtype=jnp.bfloat16), or pass cast=True. "
            "Either rounds weights to 8 significant bits, by up to 0.2 %, so that results change",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _compile_pattern(argument: str, pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(
            f"{argument}: expected a regular expression for paths, got {brief(pattern)}"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument}: {brief(pattern)} is not a regular expression ({error})"
        ) from None


def host_dtype(dtype: Any) -> np.dtype | None:
    """A dtype in this machine's byte order; None for those, like that of keys, that numpy lacks."""
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    return np.dtype(dtype).newbyteorder("=")
