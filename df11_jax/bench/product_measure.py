"""The measurements behind `df11-jax bench --product`."""

import dataclasses
import statistics
from typing import Any

from df11_jax.bench.product_check import check_products
from df11_jax.bench.product_programs import ProductWeights, compile_products, draw_rows
from df11_jax.bench.programs import Program
from df11_jax.bench.timing import Effort, Kernel, profile_kernels, time_in_turn

PRODUCT_KERNEL = "product_kernel"


@dataclasses.dataclass(frozen=True)
class Times:
    """How long one product takes.

    Attributes:
        seconds: the seconds by the clock, each time it was timed.
        kernel_seconds: the seconds of all its kernels on the GPU; None if they are not known.
    """

    seconds: tuple[float, ...]
    kernel_seconds: float | None

    @property
    def clock(self) -> float:
        """The seconds by the clock."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Product:
    """How fast one product with compressed weights is, and how fast with plain ones.

    Attributes:
        model: the name of the model.
        name: the name of the product.
        shape: the shape [k, n] of all its matrices, side by side.
        matrices: the number of compressed matrices that one call multiplies.
        rows: the number of rows that are multiplied.
        code_bits: the bits of the longest code.
        bits_per_weight: the bits of each compressed weight, everything included.
        is_fused: whether weights are decoded in registers; otherwise they are decoded first.
        error: the error of results, as a share of them, in the square mean.
        plain_error: that of results of plain weights.
        compressed: the times with compressed weights.
        plain: the times with plain weights in each orientation.
        fused_seconds: the seconds of the fused kernel alone, which does not bring rows into the
            order in which it reads them; None if it did not run, or they are not known.
    """

    model: str
    name: str
    shape: tuple[int, int]
    matrices: int
    rows: int
    code_bits: int
    bits_per_weight: float
    is_fused: bool
    error: float
    plain_error: float
    compressed: Times
    plain: dict[str, Times]
    fused_seconds: float | None

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def compressed_bytes(self) -> float:
        """The bytes of the compressed weights, which each product reads."""
        return self.bits_per_weight * self.weights / 8

    @property
    def timed_by(self) -> str:
        """Where `best_seconds` and all that follows from them come from: "kernels" or "clock"."""
        times = [self.compressed, *self.plain.values()]
        return "clock" if any(t.kernel_seconds is None for t in times) else "kernels"

    @property
    def best_seconds(self) -> float:
        """The seconds with compressed weights: of kernels if they are known for all."""
        return self._seconds(self.compressed)

    @property
    def plain_orientation(self) -> str:
        """The faster of the orientations of plain weights."""
        return min(self.plain, key=lambda name: self._seconds(self.plain[name]))

    @property
    def plain_best_seconds(self) -> float:
        """The seconds with plain weights in the faster orientation."""
        return self._seconds(self.plain[self.plain_orientation])

    @property
    def bytes_per_second(self) -> float:
        """Bytes of compressed weights read per second."""
        return self.compressed_bytes / self.best_seconds

    @property
    def ratio(self) -> float:
        """The time with compressed weights over that with plain ones: above 1 is slower."""
        return self.best_seconds / self.plain_best_seconds

    @property
    def fused_ratio(self) -> float | None:
        """The time of the fused kernel alone over that with plain weights."""
        return None if self.fused_seconds is None else self.fused_seconds / self.plain_best_seconds

    @property
    def clock(self) -> float:
        """The seconds with compressed weights by the clock, whatever else is known."""
        return self.compressed.clock

    @property
    def plain_clock(self) -> float:
        """The seconds with plain weights by the clock, in the orientation that is faster by it."""
        return min(times.clock for times in self.plain.values())

    @property
    def clock_ratio(self) -> float:
        """The ratio by the clock."""
        return self.clock / self.plain_clock

    def as_json(self) -> dict[str, Any]:
        """All figures, the derived ones too."""
        derived = (
            "timed_by",
            "best_seconds",
            "plain_orientation",
            "plain_best_seconds",
            "bytes_per_second",
            "ratio",
            "fused_ratio",
            "clock_ratio",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    def _seconds(self, times: Times) -> float:
        by_kernels = times.kernel_seconds if self.timed_by == "kernels" else None
        return times.clock if by_kernels is None else by_kernels


def measure_product(
    model: str, name: str, weights: ProductWeights, rows: int, effort: Effort
) -> Product:
    """Verifies products of so many rows with weights, and times them.

    Args:
        model: the name of the model.
        name: the name of the product.
        weights: the weights.
        rows: the number of rows.
        effort: the number and the length of the timings.

    Raises:
        RuntimeError: the products are wrong.
    """
    x = draw_rows(weights, rows)
    programs = compile_products(weights, x)
    error, plain_error = check_products(weights, x, programs)
    timed = {"compressed": programs.compressed, **programs.plain}
    seconds = time_in_turn(timed, effort)
    kernels = {way: profile_kernels(program) for way, program in timed.items()}
    times = {
        way: Times(tuple(seconds[way]), _seconds_per_call(kernels[way], program))
        for way, program in timed.items()
    }
    fused = _seconds_per_call(kernels["compressed"], programs.compressed, PRODUCT_KERNEL)
    arrays = weights.workload.arrays
    return Product(
        model=model,
        name=name,
        shape=weights.shape,
        matrices=len(arrays),
        rows=rows,
        code_bits=weights.workload.code_bits,
        bits_per_weight=weights.workload.bits_per_weight,
        is_fused=programs.is_fused,
        error=error,
        plain_error=plain_error,
        compressed=times.pop("compressed"),
        plain=times,
        fused_seconds=fused or None,
    )


def _seconds_per_call(
    kernels: list[Kernel] | None, program: Program, name: str = ""
) -> float | None:
    if kernels is None:
        return None
    return sum(kernel.seconds for kernel in kernels if name in kernel.name) / program.calls
