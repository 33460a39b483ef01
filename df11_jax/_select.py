"""Which leaves are compressed, and what to say if their types kept all of them from it."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax._array import is_df11
from df11_jax._size_report import format_bytes

BFLOAT16 = np.dtype(jnp.bfloat16)
CASTABLE = (np.dtype(np.float32), np.dtype(np.float16))

# Below this size what a leaf could save does not pay for its table.
MIN_SIZE = 16384


@dataclasses.dataclass(frozen=True)
class Selection:
    """The leaves that are to be compressed.

    Attributes:
        include: found in their paths; None for all.
        predicate: has the last word on those that the rest lets through; None for none.
        min_size: weights that they have at least.
        cast: float32 and float16 leaves are among them.
    """

    include: re.Pattern[str] | None
    predicate: Callable[[str, Any], bool] | None
    min_size: int
    cast: bool

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The leaves that `compress_params(..., **options)` compresses."""
        return cls(
            compile_pattern("include", options.get("include")),
            options.get("predicate"),
            options.get("min_size", MIN_SIZE),
            options.get("cast", False),
        )

    def has(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is one of them."""
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            return False
        is_right = leaf.dtype == BFLOAT16 or (self.cast and native_dtype(leaf) in CASTABLE)
        return is_right and self._lets_through(path, leaf)

    def would_have(self, path: str, leaf: Any) -> bool:
        """Whether a leaf would be one of them if it were bfloat16."""
        if self.cast or not isinstance(leaf, (jax.Array, np.ndarray)):
            return False
        return native_dtype(leaf) in CASTABLE and self._lets_through(path, leaf)

    def _lets_through(self, path: str, leaf: Any) -> bool:
        if leaf.size < self.min_size:
            return False
        if self.include is not None and not self.include.search(path):
            return False
        return self.predicate is None or self.predicate(path, leaf)

    def warn_if_futile(
        self, caller: str, leaves: Iterable[tuple[str, Any]], *, stacklevel: int
    ) -> None:
        """Warns if no leaf is compressed, and some would be if they were bfloat16.

        Args:
            caller: the public function that compressed.
            leaves: what came of each, by path.
            stacklevel: of `warnings.warn`, counted from the caller of this.
        """
        leaves = list(leaves)
        if any(is_df11(leaf) for _, leaf in leaves):
            return
        missed = [leaf for path, leaf in leaves if self.would_have(path, leaf)]
        if not missed:
            return
        types = " or ".join(sorted({str(native_dtype(leaf)) for leaf in missed}))
        count, verb = (f"{len(missed):,} leaves", "are") if len(missed) > 1 else ("1 leaf", "is")
        size = format_bytes(sum(leaf.nbytes for leaf in missed))
        warnings.warn(
            f"{caller} compressed nothing: only bfloat16 is, and {count} ({size}) {verb} "
            f"{types}. Make them bfloat16 (Flax: param_dtype=jnp.bfloat16), or pass cast=True. "
            "Either rounds weights to 8 significant bits, by up to 0.2 %, so that results change",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def compile_pattern(argument: str, pattern: str | None) -> re.Pattern[str] | None:
    """A regular expression for paths.

    Args:
        argument: its name, for messages.
        pattern: what was given for it.

    Raises:
        TypeError: it is no text.
        ValueError: it is no regular expression.
    """
    if pattern is None:
        return None
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(f"{argument}: expected a regular expression for paths, got {pattern!r:.80}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument}: {pattern!r:.80} is not a regular expression ({error})"
        ) from None


def native_dtype(array: Any) -> np.dtype | None:
    """The dtype in this machine's byte order; None for those, like keys, that numpy lacks."""
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return None
    return np.dtype(array.dtype).newbyteorder("=")
