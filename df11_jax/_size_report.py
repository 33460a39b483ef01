"""`size_report`: what compression of a pytree saves, leaf by leaf."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import path_name

_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_i, _letter: 1024**_i, f"{_letter}IB": 1024**_i}


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """Size of one leaf.

    Attributes:
        path: `layers/attention/query`.
        shape: its logical shape.
        dtype: of the weights; bfloat16 for compressed leaves.
        compressed: whether it is a `DF11Array`.
        nbytes_before: bytes of the weights, not compressed.
        nbytes: bytes that it takes now.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    compressed: bool
    nbytes_before: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of what it takes now."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """Sizes of all leaves of a pytree; `print` shows them as a table, `plot` as bars.

    Attributes:
        leaves: of each leaf `path`, `shape`, `dtype`, whether it is `compressed`, `nbytes_before`
            and `nbytes`, and `bits_per_weight`.
    """

    leaves: tuple[LeafSize, ...]

    @property
    def nbytes_before(self) -> int:
        """Bytes of all weights, not compressed."""
        return sum(leaf.nbytes_before for leaf in self.leaves)

    @property
    def nbytes(self) -> int:
        """Bytes that all leaves take now."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def bits_per_weight(self) -> float:
        """Of all leaves, compressed or not."""
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
    """Measures what a pytree of parameters takes, everything included.

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


def format_bytes(n: float) -> str:
    """A number of bytes, as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def parse_bytes(text: str) -> int:
    """The number of bytes in a text such as `24GB`, `24GiB` or `80G`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Z]*)\s*", text.upper())
    nbytes = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if not 1 <= nbytes < math.inf:
        raise ValueError(f"{text!r} is no memory size: expected one such as 24GB, 24GiB or 80G")
    return int(nbytes)
