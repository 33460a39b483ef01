"""The figures of `df11-jax bench --product`: as text, as JSON, as a plot."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from df11_jax.bench.figures import Figures
from df11_jax.bench.product_measure import Product
from df11_jax.bench.tables import format_table

_PRODUCTS_OF_A_BLOCK = 4


@dataclasses.dataclass(frozen=True)
class BlockSum:
    """The products of one block with so many rows, one after the other.

    Attributes:
        products: all of them, of one model and one number of rows.
    """

    products: Sequence[Product]

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.products[0].model

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.products[0].rows

    @property
    def best_seconds(self) -> float:
        """The seconds with compressed weights."""
        return sum(product.best_seconds for product in self.products)

    @property
    def plain_best_seconds(self) -> float:
        """The seconds with plain weights, of each product in the orientation that is faster."""
        return sum(product.plain_best_seconds for product in self.products)

    @property
    def bytes_per_second(self) -> float:
        """Bytes of compressed weights read per second."""
        return sum(product.compressed_bytes for product in self.products) / self.best_seconds

    @property
    def ratio(self) -> float:
        """The time with compressed weights over that with plain ones: above 1 is slower."""
        return self.best_seconds / self.plain_best_seconds

    @property
    def fused(self) -> int:
        """The number of products that are fused."""
        return sum(product.is_fused for product in self.products)

    @property
    def fused_seconds(self) -> float | None:
        """The seconds of the fused kernels alone; None if they are not known for all products."""
        seconds = [product.fused_seconds for product in self.products]
        return None if None in seconds else sum(filter(None, seconds))

    @property
    def fused_ratio(self) -> float | None:
        """The time of the fused kernels alone over that with plain weights."""
        return self.fused_seconds and self.fused_seconds / self.plain_best_seconds

    @property
    def clock(self) -> float:
        """The seconds with compressed weights by the clock."""
        return sum(product.clock for product in self.products)

    @property
    def plain_clock(self) -> float:
        """The seconds with plain weights by the clock."""
        return sum(product.plain_clock for product in self.products)

    @property
    def clock_ratio(self) -> float:
        """The ratio by the clock."""
        return self.clock / self.plain_clock

    def as_json(self) -> dict[str, Any]:
        """All figures, but for those of the products."""
        return {
            name: getattr(self, name)
            for name in (
                "model",
                "rows",
                "fused",
                "best_seconds",
                "plain_best_seconds",
                "bytes_per_second",
                "ratio",
                "fused_seconds",
                "fused_ratio",
                "clock_ratio",
            )
        }


@dataclasses.dataclass
class ProductFigures(Figures):
    """The figures of one run; `print` shows them, `plot` draws the ratios of whole blocks.

    Attributes:
        products: the products, by model and name.
    """

    products: list[Product] = dataclasses.field(default_factory=list)

    @property
    def blocks(self) -> list[BlockSum]:
        """The sums over blocks of which all products were measured, by model and rows."""
        sums = [BlockSum(self._products_of(*key)) for key in self._keys()]
        return [block for block in sums if len(block.products) == _PRODUCTS_OF_A_BLOCK]

    def as_json(self) -> dict[str, Any]:
        """All figures, in types that JSON knows: seconds, and bytes per second."""
        return super().as_json() | {
            "products": [product.as_json() for product in self.products],
            "blocks": [block.as_json() for block in self.blocks],
        }

    def __str__(self) -> str:
        lines = [*self._head_lines(), ""]
        for model in dict.fromkeys(product.model for product in self.products):
            lines += [*self._model_lines(model), ""]
        lines += [
            "All products were compared with those of plain weights before they were timed.",
            "Plain: one merged matrix, in the faster of two orientations. Ratio: the time with",
            "compressed weights over that; above 1 is slower. GB/s: of compressed weights, read.",
        ]
        if _is_by_kernels(self.products):
            lines += [
                "By the time of all kernels on the GPU, those of cuBLAS for plain weights; by the",
                "clock: in a CUDA graph. Alone: the kernel that multiplies, without that which",
                "brings rows into the order in which it reads them.",
            ]
        else:
            lines.append("By the clock.")
        return "\n".join((*lines, *self._failure_lines()))

    def _draw(self, ax: Any) -> None:
        """Draws the ratio of whole blocks against the number of rows."""
        for model in dict.fromkeys(block.model for block in self.blocks):
            blocks = [block for block in self.blocks if block.model == model]
            ax.plot([b.rows for b in blocks], [b.ratio for b in blocks], "o-", label=model)
        ax.axhline(1, color="gray", linewidth=0.8, label="plain weights")
        ax.set_xlabel("rows")
        ax.set_ylabel("time of a block's products, over that with plain weights")

    def _keys(self) -> list[tuple[str, int]]:
        """The models in the order in which they were measured, and all rows of each."""
        models = list(dict.fromkeys(product.model for product in self.products))
        keys = {(product.model, product.rows) for product in self.products}
        return sorted(keys, key=lambda key: (models.index(key[0]), key[1]))

    def _products_of(self, model: str, rows: int) -> list[Product]:
        return [p for p in self.products if (p.model, p.rows) == (model, rows)]

    def _model_lines(self, model: str) -> list[str]:
        """What is the same for all products of a model, and their table."""
        products = [product for product in self.products if product.model == model]
        bits = sum(8 * product.compressed_bytes for product in products)
        lines = [
            f"{model}: codes of at most {max(p.code_bits for p in products)} bits, "
            f"{bits / sum(product.weights for product in products):.3f} bits/weight"
        ]
        sums = {block.rows: block for block in self.blocks if block.model == model}
        rows = []
        for key in self._keys():
            if key[0] != model:
                continue
            for product in self._products_of(*key):
                way = "fused" if product.is_fused else "decoded first"
                shape = "{} x {}".format(*product.shape)
                rows.append([product.name, shape, *_cells(product, way, product.plain_orientation)])
            if key[1] in sums:
                block = sums[key[1]]
                way = f"{block.fused} of {len(block.products)} fused"
                rows.append(["sum", "", *_cells(block, way, "")])
        head = ["product", "k x n", "rows", "weights are", "us", "GB/s", "plain us", "ratio"]
        head += ["plain is", "by the clock: us", "plain us", "ratio", "alone: us", "ratio"]
        return lines + format_table(head, rows)


def _cells(figures: Product | BlockSum, way: str, orientation: str) -> list[str]:
    by_clock, alone = ["", "", ""], ["", ""]
    if _is_by_kernels(figures.products if isinstance(figures, BlockSum) else [figures]):
        by_clock = [
            *map(_micro, (figures.clock, figures.plain_clock)),
            f"{figures.clock_ratio:.3f}",
        ]
    if figures.fused_seconds is not None:
        alone = [_micro(figures.fused_seconds), f"{figures.fused_ratio:.3f}"]
    return [
        str(figures.rows),
        way,
        _micro(figures.best_seconds),
        f"{figures.bytes_per_second / 1e9:.2f}",
        _micro(figures.plain_best_seconds),
        f"{figures.ratio:.3f}",
        orientation,
        *by_clock,
        *alone,
    ]


def _is_by_kernels(products: Sequence[Product]) -> bool:
    return any(product.timed_by == "kernels" for product in products)


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"
