"""What `df11-jax compare` has measured: as text, as JSON, as a plot."""

import dataclasses
import statistics
from typing import Any

from df11_jax.bench.figures import format_table
from df11_jax.bench.plan import Plan


@dataclasses.dataclass
class Row:
    """One way to hold the weights, with one batch.

    Attributes:
        way: its name.
        batch: how many prompts.
        plan: of its memory; None if XLA could not compile it.
        device_peak: bytes in use on the device at most, since the process began and as the device
            counts them; None if that does not say so, or an earlier row used more.
        prefill_seconds: each time, for all prompts.
        decode_seconds: each time, for all steps of the token loop.
        decompress_seconds: each time, for what one step decompresses.
        not_run: why it was not, else None.
    """

    way: str
    batch: int
    plan: Plan | None = None
    device_peak: int | None = None
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)
    decompress_seconds: list[float] = dataclasses.field(default_factory=list)
    not_run: str | None = None


@dataclasses.dataclass
class Comparison:
    """The figures of one run; `print` shows them.

    Attributes:
        version: of df11_jax.
        jax_version: of jax.
        device: what was measured on.
        model: its name, or where it is.
        layers: how many it has.
        max_length: positions that it was made for.
        prompt, tokens: of each row of a batch, read and chosen.
        budget: bytes of device memory that may be used; None for no limit.
        weights: for each way bytes on the device and in host memory, and layers in host memory.
        rows: in the order in which they were run.
        longest: tokens of the longest context that fits the budget with a batch of 1, by way.
        equal: for each batch, the ways whose tokens and logits were found to be the same.
        differences: what was found to differ.
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
        """Tokens of all prompts that are read in a second."""
        return row.batch * self.prompt / statistics.median(row.prefill_seconds)

    def token_rate(self, row: Row) -> float:
        """Tokens of all rows that are chosen in a second, once the prompts are read."""
        return row.batch / self.step_seconds(row)

    def step_seconds(self, row: Row) -> float:
        """Time of one step of the token loop, which chooses a token of each row."""
        return statistics.median(row.decode_seconds) / (self.tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """All of it, in types that JSON knows: seconds, bytes, tokens a second."""
        return dataclasses.asdict(self) | {"rows": [self._row_as_json(row) for row in self.rows]}

    def _row_as_json(self, row: Row) -> dict[str, Any]:
        fields = dataclasses.asdict(row)
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
        device = ", ".join(f"{key} {value}" for key, value in self.device.items() if key != "name")
        lines = [
            f"{self.device['name']} ({device})",
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
            cells = [str(row.batch), row.way]
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
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
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
        for batch, ways in self.equal.items():
            if len(ways) > 1:
                what = f"{', '.join(ways[:-1])} and {ways[-1]}"
                lines.append(
                    f"Batch {batch}: tokens and logits of {what} are the same, bit by bit."
                )
        return lines or ["Nothing was compared: fewer than two ways could be run."]


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
