"""What `df11-jax bench` has measured: as text, as JSON, as a plot."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from df11_jax.bench.measure import Decoding, Scan
from df11_jax.bench.workload import SIGMA


@dataclasses.dataclass
class Report:
    """The figures of one run; `print` shows them, `plot` draws the roofline share.

    Attributes:
        version: of df11_jax.
        jax_version: of jax.
        device: what was measured on.
        clocks: before, under load, after; None where nobody knows.
        decodings: of single tensors, then of blocks.
        scan: over blocks.
        peers: figures of other decoders.
        missing_peers: what to install for others.
        skipped: what was not measured, and why.
        errors: what failed, and how.
    """

    version: str
    jax_version: str
    device: dict[str, Any]
    clocks: dict[str, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    decodings: list[Decoding] = dataclasses.field(default_factory=list)
    scan: Scan | None = None
    peers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing_peers: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All of it, in types that JSON knows. Times are in seconds, rates in bytes per second."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "weights": f"normal(0, {SIGMA})",
            "decodings": [decoding.as_json() for decoding in self.decodings],
            "scan": self.scan and self.scan.as_json(),
        }

    def __str__(self) -> str:
        device = ", ".join(f"{key} {value}" for key, value in self.device.items() if key != "name")
        lines = [
            f"{self.device['name']} ({device})",
            f"df11_jax {self.version}, jax {self.jax_version}; weights: normal(0, {SIGMA})",
            *(
                f"clocks {when}: {_clocks(clocks)}"
                for when, clocks in self.clocks.items()
                if clocks
            ),
            "",
            *self._decoding_table(),
            "",
            "All were decoded bit for bit before they were timed. GB/s out: bf16 that is written.",
            "Copy: GB/s read and written by a copy that moves as many bytes. Limit: GB/s out if",
            "decoding moved its bytes as fast as that copy.",
        ]
        if self.scan is not None:
            lines += ["", *self._scan_lines(self.scan)]
        if self.peers or self.missing_peers:
            lines += ["", *self._peer_lines()]
        lines += [f"Not measured: {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"FAILED: {name}: {how}" for name, how in self.errors.items()]
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draws the share of the limit against the number of weights.

        Args:
            ax: matplotlib axes to draw on; None for new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed (`pip install "df11_jax[plot]"`).
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(8, 5), layout="constrained")
        single = [d for d in self.decodings if d.matrices == 1]
        ax.plot(
            [d.weights for d in single], [d.share_of_limit for d in single], "o-", label="tensor"
        )
        timed = [d for d in single if d.kernel_share_of_limit is not None]
        if timed:
            shares = [d.kernel_share_of_limit for d in timed]
            ax.plot([d.weights for d in timed], shares, "o:", label="tensor, time on the GPU only")
        for decoding in self.decodings:
            if decoding.matrices > 1:
                label = f"block of {decoding.name}"
                ax.plot([decoding.weights], [decoding.share_of_limit], "s", label=label)
        ax.axhline(1, color="gray", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("weights decoded by one call")
        ax.set_ylabel("share of the limit set by the copy bandwidth")
        ax.set_title(self.device["name"])
        ax.legend()
        return ax

    def _decoding_table(self) -> list[str]:
        head = ["decoded in one call", "weights", "bits/weight", "ms", "GB/s out", "spread"]
        head += ["copy", "limit", "share", "on the GPU only"]
        rows = [
            [
                d.name if d.matrices == 1 else f"{d.name}, {d.matrices} matrices",
                f"{d.weights / 1e6:.1f} M",
                f"{d.bits_per_weight:.3f}",
                f"{1e3 * statistics.median(d.seconds):.4f}",
                f"{d.output_bytes_per_second / 1e9:.2f}",
                _spread(d.seconds),
                f"{d.copy_bytes_per_second / 1e9:.2f}",
                f"{d.limit_bytes_per_second / 1e9:.2f}",
                f"{100 * d.share_of_limit:.1f} %",
                "" if (share := d.kernel_share_of_limit) is None else f"{100 * share:.1f} %",
            ]
            for d in self.decodings
        ]
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        return format_table(head, rows)

    def _scan_lines(self, scan: Scan) -> list[str]:
        lines = [
            f"Scan over {scan.blocks} compressed blocks of {scan.name} "
            f"({scan.weights / 1e6:.1f} M weights each, {scan.distinct_blocks} of them different):",
            f"  {1e3 * statistics.median(scan.seconds):.4f} ms a block, "
            f"{100 * scan.overhead:+.1f} % over decoding alone "
            f"({1e3 * statistics.median(scan.decode_seconds):.4f} ms)",
        ]
        if scan.kernel_seconds is not None and scan.kernel_overhead is not None:
            lines.append(
                f"  {100 * scan.kernel_overhead:+.1f} % over the decoder's kernels alone "
                f"({1e3 * scan.kernel_seconds:.4f} ms)"
            )
        return lines

    def _peer_lines(self) -> list[str]:
        lines = []
        for peer in self.peers:
            rate = peer["output_bytes_per_second"]
            ours = peer.get("df11_jax_output_bytes_per_second")
            if ours is None:
                ours = next(
                    (
                        d.output_bytes_per_second
                        for d in self.decodings
                        if d.weights == peer["weights"]
                    ),
                    None,
                )
            where = ", one thread" if peer.get("threads") == 1 else ""
            lines.append(
                f"{peer['name']}, {peer['weights'] / 1e6:.1f} M weights{where}: "
                f"{peer['bits_per_weight']:.3f} bits/weight, {rate / 1e9:.2f} GB/s out"
                + ("" if ours is None else f"; df11_jax {ours / 1e9:.2f}, {ours / rate:.2f} times")
            )
        lines += [f"{peer} is not installed: {how}" for peer, how in self.missing_peers.items()]
        return lines


def _spread(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds)
    return f"{100 * (min(seconds) / middle - 1):+.0f} {100 * (max(seconds) / middle - 1):+.0f} %"


def _clocks(clocks: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in clocks.items())


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip()
        for cells in (zip(row, widths, strict=True) for row in (head, *rows))
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
