"""`size_report`: the sizes of the leaves of a pytree, before and after compression."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name
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
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    compressed: bool
    nbytes_before: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """The bits that each weight takes now."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """The sizes of all leaves of a pytree; `print` shows them as a table, `plot` as bars.

    Attributes:
        leaves: the sizes of the leaves, each with `path`, `shape`, `dtype`, whether it is
            `compressed`, `nbytes_before`, `nbytes` and `bits_per_weight`.
    """

    leaves: tuple[LeafSize, ...]

    @property
    def nbytes_before(self) -> int:
        """The bytes of all weights, not compressed."""
        return sum(leaf.nbytes_before for leaf in self.leaves)

    @property
    def nbytes(self) -> int:
        """The bytes that all leaves take now."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def bits_per_weight(self) -> float:
        """The bits that a weight takes now, on average over all leaves."""
        weights = sum(math.prod(leaf.shape) for leaf in self.leaves)
        return 8 * self.nbytes / max(1, weights)

    def __str__(self) -> str:
        head = ("leaf", "shape", "dtype", "before", "now", "bits/weight")
        rows = [
            (
                leaf.path,
                "x".join(map(str, leaf.shape)) or "scalar",
                leaf.dtype,
                format_bytes(leaf.nbytes_before),
                format_bytes(leaf.nbytes),
                f"{leaf.bits_per_weight:.2f}" + ("" if leaf.compressed else " (plain)"),
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

    def plot(self, ax: Any = None) -> Any:
        """Draws bytes before and now, a pair of bars for each leaf.

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
            _, ax = plt.subplots(figsize=(8, 1 + 0.3 * len(self.leaves)), layout="constrained")
        y = np.arange(len(self.leaves))
        for offset, label, sizes in (
            (-0.2, "bfloat16", [leaf.nbytes_before for leaf in self.leaves]),
            (0.2, "now", [leaf.nbytes for leaf in self.leaves]),
        ):
            ax.barh(y + offset, np.array(sizes) / 2**20, height=0.4, label=label)
        ax.set_yticks(y, [leaf.path for leaf in self.leaves])
        ax.invert_yaxis()
        ax.set_xlabel("MiB")
        ax.legend()
        return ax


def size_report(params: PyTree) -> SizeReport:
    """Measures the size of a pytree of parameters, everything included.

    Args:
        params: a pytree of arrays and `DF11Array`s, or of their shapes.

    Returns:
        A report that can be printed and plotted.
    """
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_df11):
        compressed = isinstance(leaf, DF11Array)
        shape = leaf.shape if compressed else np.shape(leaf)
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        before = leaf.nbytes if compressed else math.prod(shape) * dtype.itemsize
        leaves.append(
            LeafSize(
                path=path_name(path),
                shape=tuple(shape),
                dtype=str(dtype),
                compressed=compressed,
                nbytes_before=before,
                nbytes=leaf.compressed_nbytes if compressed else before,
            )
        )
    return SizeReport(tuple(leaves))
