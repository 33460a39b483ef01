"""What all figures of `df11-jax bench` have in common: what was measured, and what was not."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from df11_jax.bench.tables import format_device
from df11_jax.bench.workload import SIGMA


@dataclasses.dataclass
class Figures:
    """The circumstances of one run.

    Attributes:
        version: the version of df11_jax.
        jax_version: the version of jax.
        device: the device that was measured.
        clocks: the clocks before, under load and after; None where nothing tells them.
        skipped: the reason for each figure that was not measured.
        errors: the error of each measurement that failed.
    """

    version: str
    jax_version: str
    device: dict[str, Any]
    clocks: dict[str, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """Collects what fails, so that the other figures are not lost.

        Args:
            name: the name of what is measured.
        """
        try:
            yield
        except RuntimeError as error:  # XLA's, too
            kind = self.skipped if "RESOURCE_EXHAUSTED" in str(error) else self.errors
            kind[name] = str(error)

    def fits(self, name: str, needed: int, free: int | None) -> bool:
        """Whether there is memory to measure something; what does not fit is skipped.

        Args:
            name: the name of what is measured.
            needed: the bytes that it takes.
            free: the bytes that there are; None if nothing tells them.
        """
        if free is None or needed <= free:
            return True
        self.skipped[name] = f"takes {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f}"
        return False

    def as_json(self) -> dict[str, Any]:
        """All figures, in types that JSON knows, but for what classes derived from this have."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"weights": f"normal(0, {SIGMA})"}

    def plot(self) -> Any:
        """Draws the figures: see the class.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed (`pip install "df11_jax[plot]"`).
        """
        import matplotlib.pyplot as plt

        ax: Any
        figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
        self._draw(ax)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_title(self.device["name"])
        ax.legend()
        return figure

    def _draw(self, ax: Any) -> None:
        """Draws lines and their labels, against numbers on a scale of powers of two."""
        raise NotImplementedError  # each class has figures of its own

    def _head_lines(self) -> list[str]:
        return [
            format_device(self.device),
            f"df11_jax {self.version}, jax {self.jax_version}; weights: normal(0, {SIGMA})",
            *(
                f"clocks {when}: " + ", ".join(f"{key} {value}" for key, value in clocks.items())
                for when, clocks in self.clocks.items()
                if clocks
            ),
        ]

    def _failure_lines(self) -> list[str]:
        return [
            *(f"Not measured: {name}: {why}" for name, why in self.skipped.items()),
            *(f"FAILED: {name}: {how}" for name, how in self.errors.items()),
        ]
