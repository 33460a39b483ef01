"""The figures of `df11-jax compare`: as lines of text, as JSON, as a plot."""

import dataclasses
import statistics
from typing import Any

from df11_jax.bench.tables import format_device, format_table

# The ways as tables have them.
WAY_NAMES = {"default": "XLA's defaults", "cublas": "cuBLAS"}
_COLUMNS = {
    "XLA": 14,
    "weights": 10,
    "batch": 5,
    "prompt tokens/s": 15,
    "tokens/s": 9,
    "ms a step": 9,
    "decompressing": 13,
    "planned peak": 12,
    "measured peak": 13,
}


@dataclasses.dataclass
class Row:
    """The figures of one kind of weights with one batch.

    Attributes:
        xla: the name of XLA's way.
        weights: the kind of weights.
        batch: the number of prompts.
        fused: whether the token loop multiplies compressed weights without decompressing them.
        plan: the planned memory; None if XLA could not compile the programs.
        device_peak: the most bytes in use on the device since the process began, as the device
            counts them; None if it does not tell them, or an earlier row used more.
        prefill_seconds: the seconds that all prompts took, each time.
        decode_seconds: the seconds that all steps of the token loop took, each time.
        decompress_seconds: the seconds that the decompression of one step took, each time.
        bits: digests of the tokens, and of the logits of the first and of the last one.
        not_run: the reason why it was not run; None if it was.
    """

    xla: str
    weights: str
    batch: int
    fused: bool = False
    plan: dict[str, int] | None = None
    device_peak: int | None = None
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)
    decompress_seconds: list[float] = dataclasses.field(default_factory=list)
    bits: dict[str, str] = dataclasses.field(default_factory=dict)
    not_run: str | None = None


class GenerationFigures:
    """The figures of one run, which come as events; `plot` draws them.

    Attributes:
        start: the device, the model and what was asked for.
        weights: the bytes on the device and in host memory, and the layers in host memory, by
            placement.
        rows: one row for each way, kind of weights and batch, as they were run.
        longest: the tokens of the longest context that fits the budget with a batch of 1, by kind
            of weights.
        errors: what failed, by way.
    """

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}
        self.weights: dict[str, dict[str, int]] = {}
        self.rows: list[Row] = []
        self.longest: dict[str, int] = {}
        self.errors: dict[str, str] = {}

    def take(self, event: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Takes an event.

        Args:
            event: what `compare_ways` yields.

        Returns:
            What to print at once: a JSON object, and lines of text.
        """
        fields = {key: value for key, value in event.items() if key not in ("event", "xla")}
        match event["event"]:
            case "start":
                self.start = fields
                return event, self._start_lines()
            case "weights":
                self.weights[fields.pop("weights")] = fields
                return event, [self._weights_line(event["weights"])]
            case "row":
                row = Row(event["xla"], **fields)
                head = [] if self.rows else ["", *_table_head()]
                self.rows.append(row)
                return self._row_as_json(row), [*head, self._row_line(row)]
            case "longest":
                self.longest[event["weights"]] = event["context"]
                return event, []
            case "left out":
                return event, [f"{WAY_NAMES[event['xla']]}: left out, {event['why']}"]
            case _:
                self.errors[event["xla"]] = event["error"]
                return event, [f"FAILED: {WAY_NAMES[event['xla']]}: {event['error']}"]

    def prompt_rate(self, row: Row) -> float:
        """The tokens of all prompts that are read in a second."""
        return row.batch * self.start["prompt"] / statistics.median(row.prefill_seconds)

    def token_rate(self, row: Row) -> float:
        """The tokens of all rows that are chosen in a second, once the prompts are read."""
        return row.batch / self.step_seconds(row)

    def step_seconds(self, row: Row) -> float:
        """The time of one step of the token loop, which chooses a token of each row."""
        return statistics.median(row.decode_seconds) / (self.start["tokens"] - 1)

    @property
    def equal(self) -> dict[int, list[str]]:
        """The kinds of weights whose tokens and logits were found to be the same, by batch."""
        return {
            batch: [first.weights, *(row.weights for row in others if row.bits == first.bits)]
            for batch, (first, *others) in self._comparable().items()
        }

    @property
    def differences(self) -> list[str]:
        """A sentence for each difference that was found."""
        found = []
        for batch, (first, *others) in self._comparable().items():
            for row in others:
                parts = [p.replace("_", " ") for p in first.bits if first.bits[p] != row.bits[p]]
                if parts:
                    what = f"{', '.join(parts)} of {row.weights} and {first.weights}"
                    found.append(f"batch {batch}: {what}")
        return found

    def _comparable(self) -> dict[int, list[Row]]:
        """The rows that should have the same bits, by batch: of the same products."""
        rows: dict[int, list[Row]] = {}
        for row in self.rows:
            if row.xla == "default" and not row.fused and row.bits:
                rows.setdefault(row.batch, []).append(row)
        return rows

    def summary_as_json(self) -> dict[str, Any]:
        """What was found at the end, or is known where it was interrupted."""
        return {
            "event": "summary",
            "longest": self.longest,
            "equal": self.equal,
            "differences": self.differences,
            "errors": self.errors,
        }

    def _row_as_json(self, row: Row) -> dict[str, Any]:
        rates: dict[str, float | None] = {
            "prompt_tokens_per_second": None,
            "tokens_per_second": None,
        }
        if row.not_run is None:
            rates = {
                "prompt_tokens_per_second": self.prompt_rate(row),
                "tokens_per_second": self.token_rate(row),
            }
        return {"event": "row"} | dataclasses.asdict(row) | rates

    def summary(self) -> str:
        """What was found at the end, or is known where it was interrupted."""
        lines = ["", *self._notes()]
        if any(row.not_run is None for row in self.rows):
            lines += ["", *self._steps_table()]
        if self.longest:
            lines += ["", f"Longest context in {_bytes(self.start['budget'])}, with a batch of 1:"]
            lines += [f"  {name}: {self._longest(n)}" for name, n in self.longest.items()]
        return "\n".join([*lines, "", *self._agreement()])

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
        for (xla, kind), rows in self._series().items():
            label = kind if xla == "default" else f"{kind}, {WAY_NAMES[xla]}"
            run = [row for row in rows if row.not_run is None]
            rates = [self.token_rate(row) for row in run]
            speed.plot([row.batch for row in run], rates, "o-", label=label)
            planned = [(row.batch, row.plan["peak"] / 1e9) for row in rows if row.plan is not None]
            memory.plot(
                [batch for batch, _ in planned], [peak for _, peak in planned], "o-", label=label
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
        if any(row.not_run for row in self.rows) and self.start["budget"] is not None:
            memory.axhline(self.start["budget"] / 1e9, color="gray", linewidth=0.8, label="limit")
        speed.legend()
        memory.legend()
        context.bar(list(self.longest), list(self.longest.values()))
        context.set_ylabel("tokens of the longest context, batch 1")
        figure.suptitle(f"{self.start['model']}; {self.start['device']['name']}")
        return figure

    def _series(self) -> dict[tuple[str, str], list[Row]]:
        """The rows of each way and kind of weights."""
        series: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            series.setdefault((row.xla, row.weights), []).append(row)
        return series

    def _start_lines(self) -> list[str]:
        s = self.start
        return [
            format_device(s["device"]),
            f"df11_jax {s['version']}, jax {s['jax_version']}",
            f"{s['model']}; prompts of {s['prompt']} tokens, {s['tokens']} chosen after each",
            "",
        ]

    def _weights_line(self, name: str) -> str:
        weights = self.weights[name]
        line = f"{name}: weights of {_bytes(weights['device_bytes'])} on the device"
        if name == "offloaded":
            line += (
                f", {_bytes(weights['host_bytes'])} in host memory: {weights['host_layers']} of "
                f"{self.start['layers']} layers, copied one by one as they are needed"
            )
        return line

    def _row_line(self, row: Row) -> str:
        cells = [WAY_NAMES[row.xla], row.weights, str(row.batch)]
        if row.not_run is None:
            cells += [
                f"{self.prompt_rate(row):.1f}",
                f"{self.token_rate(row):.2f}",
                f"{1e3 * self.step_seconds(row):.2f}",
                "fused" if row.fused else _decompressing(row),
            ]
        else:
            cells += [row.not_run, "", "", ""]
        cells.append("" if row.plan is None else _bytes(row.plan["peak"]))
        cells.append("" if row.device_peak is None else _bytes(row.device_peak))
        return _aligned(cells)

    def _steps_table(self) -> list[str]:
        """The milliseconds of a step, a column for each batch; compressed over plain weights."""
        batches = sorted({row.batch for row in self.rows})
        steps = {
            (row.xla, row.weights, row.batch): 1e3 * self.step_seconds(row)
            for row in self.rows
            if row.not_run is None
        }
        table = []
        for xla, kind in self._series():
            times = [steps.get((xla, kind, batch)) for batch in batches]
            cells = ["" if time is None else f"{time:.2f}" for time in times]
            table.append([f"{kind}, {WAY_NAMES[xla]}", *cells])
        best = {
            batch: min(times)
            for batch in batches
            if (times := [t for (_, k, b), t in steps.items() if (k, b) == ("compressed", batch)])
        }
        for xla in WAY_NAMES:
            cells = [
                f"{best[batch] / plain:.2f}"
                if batch in best and (plain := steps.get((xla, "plain", batch)))
                else ""
                for batch in batches
            ]
            if any(cells):
                table.append([f"compressed at its best / plain, {WAY_NAMES[xla]}", *cells])
        return format_table(["ms a step, batch", *map(str, batches)], table)

    def _notes(self) -> list[str]:
        notes = [
            "A step chooses a token of each row. Decompressing: a program that does only what a",
            "step decompresses. Planned peak: of device memory, with weights and cache, by XLA.",
        ]
        if any(row.fused for row in self.rows):
            notes += [
                "Fused: compressed weights are multiplied as they are, in sums of another order.",
                "Exact: they are decompressed first, which gives the bits of plain weights.",
            ]
        if any(row.xla == "cublas" for row in self.rows):
            notes.append("cuBLAS: XLA_FLAGS=--xla_gpu_enable_triton_gemm=false.")
        if any(row.device_peak for row in self.rows):
            notes.append("Measured peak: as the device counts, if no row before had a higher one.")
        if self.start and self.start["device"]["platform"] == "cpu":
            notes += [
                "On a CPU host memory is the device's own: offloading costs a copy, saves nothing.",
                "The planned peak leaves out what is offloaded. It includes what XLA does on a CPU",
                "only: it copies plain weights to float32 before it multiplies them.",
            ]
        return notes

    def _longest(self, tokens: int) -> str:
        if not tokens:
            return "does not fit"
        all_of_it = tokens == self.start["max_length"]
        return f"{tokens} tokens" + (" (as many as the model was made for)" if all_of_it else "")

    def _agreement(self) -> list[str]:
        lines = [f"DIFFERENT: {difference}" for difference in self.differences]
        for batch, names in self.equal.items():
            if len(names) > 1:
                what = f"{', '.join(names[:-1])} and {names[-1]}"
                lines.append(
                    f"Batch {batch}: tokens and logits of {what} are the same, bit by bit."
                )
        return lines or [
            "Nothing was compared: fewer than two kinds of weights were run by XLA's defaults."
        ]


def _decompressing(row: Row) -> str:
    if not row.decompress_seconds:
        return ""
    return f"{1e3 * statistics.median(row.decompress_seconds):.2f} ms"


def _table_head() -> list[str]:
    line = _aligned(list(_COLUMNS))
    return [line, "-" * len(line)]


def _aligned(cells: list[str]) -> str:
    """The line of a table that is printed row by row, so that no later row can widen a column."""
    left = 2
    return "  ".join(
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, _COLUMNS.values(), strict=True))
    ).rstrip()


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
