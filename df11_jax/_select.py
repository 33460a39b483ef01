"""The rule for what is compressed and kept, and what to say if dtypes keep all leaves from it."""

import dataclasses
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax import _layout
from df11_jax._array import is_df11
from df11_jax._brief import brief, listed
from df11_jax._host_arrays import BFLOAT16
from df11_jax._leaves import FROM_TORCH, is_array, is_foreign, plain_shape
from df11_jax._lengths import common_length
from df11_jax._units import format_bytes

_CASTABLE = (np.dtype(np.float32), np.dtype(np.float16))

# What an optimizer has for each weight, in a train state of Flax's or MaxText's: it changes with
# every step, and is left as it is.
_OPTIMIZER_STATE = re.compile(r"(^|/)opt_state(/|$)")

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

    It has to be bfloat16, large enough, and of no more dimensions than the format can hold. What is
    to be a stack has an axis for that: a scalar beside stacks is none.

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
        and 0 <= len(shape) - stack_axes <= _layout.MAX_DIMS
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
        stack_axis: the axis of stacks that is to be brought to the front.
        batch_axes: patterns, and how many axes of a slice count matrices where they are found in a
            path.
        row_axes: the same for the axes after these that are the rows of a matrix.
        along_columns: a pattern that is found in the paths of matrices whose pairs are along their
            columns; None if there are none.
    """

    include: re.Pattern[str] | None = None
    stacked: re.Pattern[str] | None = None
    predicate: Callable[[str, Any], bool] | None = None
    min_size: int = MIN_SIZE
    cast: bool = False
    stack_axis: int = 0
    batch_axes: tuple[tuple[re.Pattern[str], int], ...] = ()
    row_axes: tuple[tuple[re.Pattern[str], int], ...] = ()
    along_columns: re.Pattern[str] | None = None

    @classmethod
    def from_options(
        cls,
        *,
        include: str | None = None,
        stacked: str | None = None,
        predicate: Callable[[str, Any], bool] | None = None,
        min_size: int = MIN_SIZE,
        cast: bool = False,
        stack_axis: int = 0,
        batch_axes: Mapping[str, int] | None = None,
        row_axes: Mapping[str, int] | None = None,
        along_columns: str | None = None,
    ) -> Self:
        """The leaves that `compress_params` compresses if it is called with these options.

        Raises:
            TypeError: a pattern is not a string, a number of axes no integer, or `batch_axes` or
                `row_axes` no mapping.
            ValueError: a pattern is not a regular expression, or `stack_axis` is negative, or
                given without `stacked`.
        """
        patterns = _compile_pattern("include", include), _compile_pattern("stacked", stacked)
        stack_axis = operator.index(stack_axis)
        if stack_axis < 0 or (stack_axis and stacked is None):
            raise ValueError(
                f"stack_axis={stack_axis}: expected the number of an axis, counted from 0, of the "
                "leaves that stacked=... names"
            )
        counts = _compile_counts("batch_axes", batch_axes), _compile_counts("row_axes", row_axes)
        columns = _compile_pattern("along_columns", along_columns)
        return cls(*patterns, predicate, min_size, cast, stack_axis, *counts, columns)

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The selection that arguments of `compress_params` make, and the other arguments."""
        own = {field.name for field in dataclasses.fields(cls)}
        selection = cls.from_options(**{k: v for k, v in options.items() if k in own})
        return selection, {k: v for k, v in options.items() if k not in own}

    def stack_of(self, path: str) -> str | None:
        """The stack that a leaf is of: its path as far as `stacked` is found; None for no stack."""
        found = self.stacked.search(path) if self.stacked is not None else None
        if found is None or _OPTIMIZER_STATE.search(path):
            return None
        end = path.find("/", max(found.start(), found.end() - 1))
        if end < 0:  # the pattern goes on to the name of the leaf, which is no stack by itself
            end = path.find("/", found.start())
        return path[:end] if end >= 0 else path

    def stack_axes(self, path: str) -> int:
        """The number of stack axes of a leaf."""
        return 0 if self.stack_of(path) is None else 1

    def matrix(self, path: str) -> tuple[int, int | None, bool]:
        """How a slice of a leaf is a matrix: `batch_axes`, `row_axes`, `along_columns`."""
        batch, rows = (
            next((axes for pattern, axes in counts if pattern.search(path)), None)
            for counts in (self.batch_axes, self.row_axes)
        )
        columns = self.along_columns is not None and self.along_columns.search(path) is not None
        return batch or 0, rows, columns

    def moves(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is an array with a stack axis that is not in front."""
        return bool(self.stack_axis and self.stack_axes(path) and plain_shape(leaf))

    def takes_out_of_box(self, path: str, leaf: Any) -> bool:
        """Whether a leaf that came of compression is no longer what a box of Flax says of it."""
        return is_df11(leaf) or self.moves(path, leaf)

    def to_front(self, path: str, leaf: Any) -> Any:
        """An array with its stack axis in front; any other leaf as it is."""
        if not self.moves(path, leaf):
            return leaf
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        return numpy.moveaxis(leaf, self.stack_axis, 0)

    def check(
        self,
        caller: str,
        leaves: Sequence[tuple[str, tuple[int, ...] | None]],
        *,
        compressed: Iterable[str] = (),
        stacklevel: int,
    ) -> None:
        """Checks that patterns are found, and that the leaves of a stack have as many layers.

        A pattern that is found in no path is warned of: the tree may be a part of one.

        Args:
            caller: the name of the public function that is to compress.
            leaves: the paths of all leaves, and the shapes of those that are plain arrays.
            compressed: the paths of the leaves that are compressed already.
            stacklevel: the one of `warnings.warn`, counted from the caller of this method.

        Raises:
            ValueError: the leaves of a stack differ in the number of layers, or one has no such
                axis, or is compressed, so that the others have been moved as well. The message has
                their paths and shapes.
        """
        for path in compressed if self.stack_axis else ():
            if self.stack_axes(path):
                raise ValueError(
                    f"{path}: is compressed already, and its layers are along axis 0, like those "
                    f"of the leaves beside it: leave out stack_axis={self.stack_axis}"
                )
        patterns = [
            ("include", self.include),
            ("stacked", self.stacked),
            *(("batch_axes", pattern) for pattern, _ in self.batch_axes),
            *(("row_axes", pattern) for pattern, _ in self.row_axes),
            ("along_columns", self.along_columns),
        ]
        for argument, pattern in patterns:
            if pattern and leaves and not any(pattern.search(path) for path, _ in leaves):
                warnings.warn(
                    f"{caller}: {argument}={brief(pattern.pattern)} is found in no path of a leaf. "
                    f"The paths are {listed([path for path, _ in leaves])}",
                    UserWarning,
                    stacklevel=stacklevel + 1,
                )
        stacks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for path, shape in leaves:
            stack = self.stack_of(path)
            if stack is not None and shape:  # a scalar has no layers, whatever the pattern says
                if len(shape) <= self.stack_axis:
                    raise ValueError(
                        f"{path}: expected layers along axis {self.stack_axis}, as stack_axis "
                        f"says, got the shape {list(shape)}"
                    )
                stacks.setdefault(stack, []).append((path, shape))
        for stack, members in stacks.items():
            try:
                common_length(members, "layers", self.stack_axis)
            except ValueError as error:
                raise ValueError(
                    f"{error}. (Leaves below {stack} count as one stack, because stacked="
                    f"{brief(self.stacked.pattern if self.stacked else None)} is found up to "
                    "there: let it name what is stacked, and no more)"
                ) from None

    def admits(self, path: str, shape: Sequence[int], dtype: Any) -> bool:
        """Whether a leaf is one of them by all that does not need its elements."""
        return (
            is_candidate(
                shape,
                dtype,
                stack_axes=self.stack_axes(path),
                min_size=self.min_size,
                cast=self.cast,
            )
            and (self.include is None or self.include.search(path) is not None)
            and _OPTIMIZER_STATE.search(path) is None
        )

    def has(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is one of them."""
        return (
            is_array(leaf)
            and self.admits(path, leaf.shape, leaf.dtype)
            and (self.predicate is None or self.predicate(path, leaf))
        )

    def would_have(self, path: str, leaf: Any) -> bool:
        """Whether a leaf would be one of them if it were bfloat16, and is not."""
        return (
            is_array(leaf)
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

    def warn_of_foreign(
        self, caller: str, leaves: Iterable[tuple[str, Any]], *, stacklevel: int
    ) -> None:
        """Warns of arrays of other libraries that would be compressed if they were JAX's.

        Args:
            caller: the name of the public function that compresses.
            leaves: paths and leaves.
            stacklevel: the one of `warnings.warn`, counted from the caller of this method.
        """
        found = [
            f"{path} ({type(leaf).__module__.partition('.')[0]}.{type(leaf).__name__})"
            for path, leaf in leaves
            if is_foreign(leaf) and self.admits(path, tuple(leaf.shape), BFLOAT16)
        ]
        if found:
            warnings.warn(
                f"{caller}: arrays that are neither JAX's nor numpy's stay as they are: "
                f"{listed(found)}. Convert them first: a tensor of torch by {FROM_TORCH}, others "
                "by numpy.asarray(leaf)",
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def _compile_pattern(argument: str, pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else _compile(argument, pattern)


def _compile_counts(
    argument: str, counts: Mapping[str, int] | None
) -> tuple[tuple[re.Pattern[str], int], ...]:
    if counts is not None and not isinstance(counts, Mapping):
        raise TypeError(
            f"{argument}: expected a dict of regular expressions for paths and numbers of axes, "
            f"got {brief(counts)}"
        )
    return tuple(
        (_compile(argument, pattern), operator.index(axes))
        for pattern, axes in (counts or {}).items()
    )


def _compile(argument: str, pattern: str) -> re.Pattern[str]:
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
