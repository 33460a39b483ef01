"""`size_report`: the sizes of the leaves of a pytree, before and after compression."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name
from df11_jax._identity import identity
from df11_jax._leaves import as_array, no_pytree
from df11_jax._units import format_bytes


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """The size of one leaf.

    Attributes:
        path: the path of the leaf: `layers/attention/query`.
        shape: its logical shape.
        dtype: the dtype of its weights; bfloat16 for compressed leaves.
        compressed: whether it is a `DF11Array`.
        nbytes_before: the bytes of its weights, not compressed.
        nbytes: the bytes that it takes now.
        tied_to: the path of the first leaf that is the same array; None if none before it is.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    compressed: bool
    nbytes_before: int
    nbytes: int
    tied_to: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """The bits that each weight takes now."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


@dataclasses.dataclass(frozen=True, repr=False)
class SizeReport:
    """The sizes of all leaves of a pytree; `print` shows them as a table, `plot` as bars.

    Tied leaves, which are one array at several paths, count once in all totals, and show as bytes
    at the first of these paths alone.

    Attributes:
        leaves: the sizes of the leaves, each with `path`, `shape`, `dtype`, whether it is
            `compressed`, `nbytes_before`, `nbytes`, `bits_per_weight` and `tied_to`.
    """

    leaves: tuple[LeafSize, ...]

    @property
    def nbytes_before(self) -> int:
        """The bytes of all weights, not compressed."""
        return sum(leaf.nbytes_before for leaf in self._distinct)

    @property
    def nbytes(self) -> int:
        """The bytes that all leaves take now."""
        return sum(leaf.nbytes for leaf in self._distinct)

    @property
    def bits_per_weight(self) -> float:
        """The bits that a weight takes now, on average over all leaves."""
        weights = sum(math.prod(leaf.shape) for leaf in self._distinct)
        return 8 * self.nbytes / max(1, weights)

    @property
    def _distinct(self) -> list[LeafSize]:
        return [leaf for leaf in self.leaves if leaf.tied_to is None]

    def __str__(self) -> str:
        head = ("leaf", "shape", "dtype", "before", "now", "bits/weight")
        rows = [
            (
                leaf.path,
                "x".join(map(str, leaf.shape)) or "scalar",
                leaf.dtype,
                *(
                    ("tied", "tied", f"(is {leaf.tied_to})")
                    if leaf.tied_to is not None
                    else (
                        format_bytes(leaf.nbytes_before),
                        format_bytes(leaf.nbytes),
                        f"{leaf.bits_per_weight:.2f}" + ("" if leaf.compressed else " (plain)"),
                    )
                ),
            )
            for leaf in self.leaves
        ]
        before, now = self.nbytes_before, self.nbytes
        share = f"{100 * now / before:.1f} %" if before else "-"
        total = (
            "total",
            share,
            "",
            format_bytes(before),
            format_bytes(now),
            f"{self.bits_per_weight:.2f}",
        )
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in cells).rstrip()
            for cells in (enumerate(zip(row, widths, strict=True)) for row in (head, *rows, total))
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__  # what a notebook shows

    def plot(self, ax: Any = None) -> Any:
        """Draws bytes before and now, a pair of bars for each leaf; for tied ones, at the first.

        Args:
            ax: matplotlib axes to draw on; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed (`pip install "df11_jax[plot]"`).
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                f'plots need matplotlib ({error}). Install with: pip install "df11_jax[plot]"'
            ) from None

        if ax is None:
            _, ax = plt.subplots(figsize=(8, 1 + 0.3 * len(self._distinct)), layout="constrained")
        leaves = self._distinct
        y = np.arange(len(leaves))
        for offset, label, sizes in (
            (-0.2, "bfloat16", [leaf.nbytes_before for leaf in leaves]),
            (0.2, "now", [leaf.nbytes for leaf in leaves]),
        ):
            ax.barh(y + offset, np.array(sizes) / 2**20, height=0.4, label=label)
        ax.set_yticks(y, [leaf.path for leaf in leaves])
        ax.invert_yaxis()
        ax.set_xlabel("MiB")
        ax.legend()
        return ax


def size_report(params: PyTree) -> SizeReport:
    """Measures the size of a pytree of parameters, everything included.

    Tied leaves, plain or compressed, count once. Where a tied leaf was compressed at one path and
    left plain at another, there are two, and both count, now and before. Leaves that are neither
    arrays nor numbers, such as strings and functions, are left out.

    Args:
        params: a pytree of arrays and `DF11Array`s, or of their shapes.

    Returns:
        A report that can be printed and plotted.

    Raises:
        TypeError: `params` is no container and no array, such as a model or a path.
    """
    leaves = []
    first_paths: dict[Hashable, str] = {}
    with_paths = jax.tree.leaves_with_path(params, is_leaf=is_df11)
    # All at once: identities tell arrays apart only while they exist, and some are made here.
    arrays = [as_array(leaf) for _, leaf in with_paths]
    for (path, _), leaf in zip(with_paths, arrays, strict=True):
        if not _has_size(leaf):
            if path == ():
                raise no_pytree("size_report", params)
            continue
        compressed = isinstance(leaf, DF11Array)
        shape = leaf.shape if compressed else np.shape(leaf)
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        before = leaf.nbytes if compressed else math.prod(shape) * dtype.itemsize
        name = path_name(path)
        own = identity(leaf)
        leaves.append(
            LeafSize(
                path=name,
                shape=tuple(shape),
                dtype=str(dtype),
                compressed=compressed,
                nbytes_before=before,
                nbytes=leaf.compressed_nbytes if compressed else before,
                tied_to=first_paths.get(own),
            )
        )
        first_paths.setdefault(own, name)
    return SizeReport(tuple(leaves))


def _has_size(leaf: Any) -> bool:
    """Whether a leaf is an array of any library, the shape of one, or a number."""
    is_sized = hasattr(leaf, "shape") and hasattr(getattr(leaf, "dtype", None), "itemsize")
    return is_sized or is_df11(leaf) or isinstance(leaf, (bool, int, float, complex))
