"""The figures of `df11-jax compare`: as text, as JSON, as a plot."""

import dataclasses
import statistics
from typing import Any

from df11_jax.bench.plan import Plan
from df11_jax.bench.tables import format_device, format_table


@dataclasses.dataclass
class Row:
    """The figures of one placement of the weights with one batch.

    Attributes:
        placement: the name of the placement.
        batch: the number of prompts.
        plan: the planned memory; None if XLA could not compile the programs.
        device_peak: the most bytes in use on the device since the process began, as the device
            counts them; None if it does not tell them, or an earlier row used more.
        prefill_seconds: the seconds that all prompts took, each time.
        decode_seconds: the seconds that all steps of the token loop took, each time.
        decompress_seconds: the seconds that the decompression of one step took, each time.
        not_run: the reason why it was not run; None if it was.
    """

    placement: str
    batch: int
    plan: Plan | None = None
    device_peak: int | None = None
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)
    decompress_seconds: list[float] = dataclasses.field(default_factory=list)
    not_run: str | None = None


@dataclasses.dataclass
class GenerationFigures:
    """The figures of one run; `print` shows them, `plot` draws them.

    Attributes:
        version: the version of df11_jax.
        jax_version: the version of jax.
        device: the device that was measured.
        model: the name of the model, or its path.
        layers: the number of its layers.
        max_length: the number of positions that it was made for.
        prompt, tokens: the number of tokens that are read, and chosen, for each row of a batch.
        budget: the bytes of device memory that may be used; None for no limit.
        weights: the bytes on the device and in host memory, and the layers in host memory, by
            placement.
        rows: one row for each batch and placement, as they were run.
        longest: the tokens of the longest context that fits the budget with a batch of 1, by
            placement.
        equal: the placements whose tokens and logits were found to be the same, by batch.
        differences: a sentence for each difference that was found.
    """

    version: str
    jax_version: str
    device: dict[str, Any]
    model: str
    layers: int
    max_length: int
    prompt: int
    tokens: int
    budget: int | None
    weights: dict[str, dict[str, int]]
    rows: list[Row] = dataclasses.field(default_factory=list)
    longest: dict[str, int] = dataclasses.field(default_factory=dict)
    equal: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    differences: list[str] = dataclasses.field(default_factory=list)

    def prompt_rate(self, row: Row) -> float:
        """The tokens of all prompts that are read in a second."""
        return row.batch * self.prompt / statistics.median(row.prefill_seconds)

    def token_rate(self, row: Row) -> float:
        """The tokens of all rows that are chosen in a second, once the prompts are read."""
        return row.batch / self.step_seconds(row)

    def step_seconds(self, row: Row) -> float:
        """The time of one step of the token loop, which chooses a token of each row."""
        return statistics.median(row.decode_seconds) / (self.tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """All figures, in types that JSON knows: seconds, bytes, tokens a second."""
        return dataclasses.asdict(self) | {"rows": [self._row_as_json(row) for row in self.rows]}

    def _row_as_json(self, row: Row) -> dict[str, Any]:
        fields = dataclasses.asdict(row)
        fields = {"way": fields.pop("placement")} | fields
        fields["plan"] = row.plan and row.plan._asdict() | {"peak": row.plan.peak}
        rates: dict[str, float | None] = {
            "prompt_tokens_per_second": None,
            "tokens_per_second": None,
        }
        if row.not_run is None:
            rates = {
                "prompt_tokens_per_second": self.prompt_rate(row),
                "tokens_per_second": self.token_rate(row),
            }
        return fields | rates

    def __str__(self) -> str:
        lines = [
            format_device(self.device),
            f"df11_jax {self.version}, jax {self.jax_version}",
            f"{self.model}; prompts of {self.prompt} tokens, {self.tokens} chosen after each",
            "",
            *(self._weights_line(name) for name in self.weights),
            "",
            *self._table(),
            "",
            *self._notes(),
        ]
        if self.longest:
            assert self.budget is not None
            lines += ["", f"Longest context in {_bytes(self.budget)}, with a batch of 1:"]
            lines += [f"  {name}: {self._longest(n)}" for name, n in self.longest.items()]
        lines += ["", *self._agreement()]
        return "\n".join(lines)

    def plot(self) -> Any:
        """Draws tokens a second and planned memory by batch, and the longest contexts.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed (`pip install "df11_jax[plot]"`).
        """
        import matplotlib.pyplot as plt

        figure, (speed, memory, context) = plt.subplots(
            1, 3, figsize=(14, 4.5), layout="constrained"
        )
        batches = sorted({row.batch for row in self.rows})
        for name in self.weights:
            rows = [row for row in self.rows if row.placement == name]
            run = [row for row in rows if row.not_run is None]
            rates = [self.token_rate(row) for row in run]
            speed.plot([row.batch for row in run], rates, "o-", label=name)
            planned = [(row.batch, row.plan.peak / 1e9) for row in rows if row.plan is not None]
            memory.plot(
                [batch for batch, _ in planned], [peak for _, peak in planned], "o-", label=name
            )
        for ax, what in (
            (speed, "tokens a second, all rows together"),
            (memory, "GB, planned peak"),
        ):
            ax.set_xscale("log")
            ax.set_xticks(batches, map(str, batches))
            ax.minorticks_off()
            ax.set_xlabel("batch")
            ax.set_ylabel(what)
        if any(row.not_run is None for row in self.rows):
            speed.set_yscale("log")
        memory.set_ylim(bottom=0)
        if any(row.not_run for row in self.rows) and self.budget is not None:
            memory.axhline(self.budget / 1e9, color="gray", linewidth=0.8, label="limit")
        speed.legend()
        memory.legend()
        context.bar(list(self.longest), list(self.longest.values()))
        context.set_ylabel("tokens of the longest context, batch 1")
        figure.suptitle(f"{self.model}; {self.device['name']}")
        return figure

    def _weights_line(self, name: str) -> str:
        weights = self.weights[name]
        line = f"{name}: weights of {_bytes(weights['device_bytes'])} on the device"
        if name == "offloaded":
            line += (
                f", {_bytes(weights['host_bytes'])} in host memory: {weights['host_layers']} of "
                f"{self.layers} layers, copied one by one as they are needed"
            )
        return line

    def _table(self) -> list[str]:
        head = ["batch", "weights", "prompt tokens/s", "tokens/s", "ms a step", "decompressing"]
        head += ["planned peak", "measured peak"]
        rows = []
        for row in self.rows:
            cells = [str(row.batch), row.placement]
            if row.not_run is None:
                cells += [
                    f"{self.prompt_rate(row):.1f}",
                    f"{self.token_rate(row):.2f}",
                    f"{1e3 * self.step_seconds(row):.2f}",
                    f"{1e3 * statistics.median(row.decompress_seconds):.2f} ms"
                    if row.decompress_seconds
                    else "",
                ]
            else:
                cells += [row.not_run, "", "", ""]
            cells.append("" if row.plan is None else _bytes(row.plan.peak))
            cells.append("" if row.device_peak is None else _bytes(row.device_peak))
            rows.append(cells)
        return format_table(head, rows)

    def _notes(self) -> list[str]:
        notes = [
            "A step chooses a token of each row. Decompressing: a program that does only what a",
            "step decompresses. Planned peak: of device memory, with weights and cache, by XLA.",
        ]
        if any(row.device_peak for row in self.rows):
            notes.append("Measured peak: as the device counts, if no row before had a higher one.")
        if self.device["platform"] == "cpu":
            notes += [
                "On a CPU host memory is the device's own: offloading costs a copy, saves nothing.",
                "The planned peak leaves out what is offloaded. It includes what XLA does on a CPU",
                "only: it copies plain weights to float32 before it multiplies them.",
            ]
        return notes

    def _longest(self, tokens: int) -> str:
        if not tokens:
            return "does not fit"
        all_of_it = tokens == self.max_length
        return f"{tokens} tokens" + (" (as many as the model was made for)" if all_of_it else "")

    def _agreement(self) -> list[str]:
        lines = [f"DIFFERENT: {difference}" for difference in self.differences]
        for batch, names in self.equal.items():
            if len(names) > 1:
                what = f"{', '.join(names[:-1])} and {names[-1]}"
                lines.append(
                    f"Batch {batch}: tokens and logits of {what} are the same, bit by bit."
                )
        return lines or ["Nothing was compared: fewer than two placements could be run."]


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
