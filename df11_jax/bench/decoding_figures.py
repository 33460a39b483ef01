"""The figures of `df11-jax bench`: as text, as JSON, as a plot."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from df11_jax.bench.figures import Figures
from df11_jax.bench.measure import Decoding, Scan
from df11_jax.bench.tables import format_table


@dataclasses.dataclass
class DecodingFigures(Figures):
    """The figures of one run; `print` shows them, `plot` draws the roofline share.

    Attributes:
        decodings: the decoding of single tensors, then that of blocks.
        scan: the scan over blocks; None if it was not measured.
        peers: the figures of other decoders.
        missing_peers: the command that installs each other decoder that is not here.
    """

    decodings: list[Decoding] = dataclasses.field(default_factory=list)
    scan: Scan | None = None
    peers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing_peers: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All figures, in types that JSON knows: seconds, and bytes per second."""
        return super().as_json() | {
            "decodings": [decoding.as_json() for decoding in self.decodings],
            "scan": self.scan and self.scan.as_json(),
        }

    def __str__(self) -> str:
        lines = [
            *self._head_lines(),
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
        return "\n".join((*lines, *self._failure_lines()))

    def _draw(self, ax: Any) -> None:
        """Draws the share of the limit against the number of weights."""
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
        ax.set_xlabel("weights decoded by one call")
        ax.set_ylabel("share of the limit set by the copy bandwidth")

    def _decoding_table(self) -> list[str]:
        head = ["decoded in one call", "weights", "longest code", "bits/weight", "ms", "GB/s out"]
        head += ["spread", "copy", "limit", "share", "on the GPU only: us", "GB/s out", "share"]
        rows = [
            [
                d.name if d.matrices == 1 else f"{d.name}, {d.matrices} matrices",
                f"{d.weights / 1e6:.1f} M",
                f"{d.code_bits} bits",
                f"{d.bits_per_weight:.3f}",
                f"{1e3 * statistics.median(d.seconds):.4f}",
                f"{d.output_bytes_per_second / 1e9:.2f}",
                _spread(d.seconds),
                f"{d.copy_bytes_per_second / 1e9:.2f}",
                f"{d.limit_bytes_per_second / 1e9:.2f}",
                f"{100 * d.share_of_limit:.1f} %",
                _format("{:.1f}", d.kernel_seconds, 1e6),
                _format("{:.2f}", d.kernel_output_bytes_per_second, 1e-9),
                _format("{:.1f} %", d.kernel_share_of_limit, 100),
            ]
            for d in self.decodings
        ]
        return format_table(head, rows)

    def _scan_lines(self, scan: Scan) -> list[str]:
        lines = [
            f"Scan over {scan.blocks} compressed blocks of {scan.name} "
            f"({scan.weights / 1e6:.1f} M weights each, {scan.distinct_blocks} of them different, "
            f"codes of at most {scan.code_bits} bits):",
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


def _format(template: str, value: float | None, scale: float) -> str:
    return "" if value is None else template.format(scale * value)


def _spread(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds)
    return f"{100 * (min(seconds) / middle - 1):+.0f} {100 * (max(seconds) / middle - 1):+.0f} %"
