"""The measurements behind `df11-jax bench`."""

import dataclasses
import statistics
from typing import Any

from df11_jax.bench.programs import Program, copy_programs, decode_program, scan_program
from df11_jax.bench.timing import Effort, profile_kernels, time_in_turn
from df11_jax.bench.workload import Workload, repeat_slices

DECODE_KERNEL = "decode_kernel"

_PROFILED_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How fast one workload is decoded, and what the device's memory would allow.

    Attributes:
        name: the name of the workload.
        weights: the number of weights that one call decodes.
        matrices: the number of matrices that one call decodes.
        code_bits: the bits of the longest code.
        bits_per_weight: the bits of each compressed weight, everything included.
        seconds: the seconds of one call, each time it was timed.
        copy_bytes_per_second: the bytes read and written by the faster of two copies that move as
            much.
        kernel_seconds: the seconds of one call on the GPU alone; None if they are not known.
        copy_kernel_seconds: the seconds of one copy on the GPU alone; None if they are not known.
    """

    name: str
    weights: int
    matrices: int
    code_bits: int
    bits_per_weight: float
    seconds: tuple[float, ...]
    copy_bytes_per_second: float
    kernel_seconds: float | None
    copy_kernel_seconds: float | None

    @property
    def output_bytes_per_second(self) -> float:
        """Bytes of bfloat16 written per second."""
        return 2 * self.weights / statistics.median(self.seconds)

    @property
    def limit_bytes_per_second(self) -> float:
        """Bytes written per second if decoding moved its bytes as fast as the copy does."""
        return self.copy_bytes_per_second * 16 / (16 + self.bits_per_weight)

    @property
    def share_of_limit(self) -> float:
        """The speed, as a share of what the copy allows."""
        return self.output_bytes_per_second / self.limit_bytes_per_second

    @property
    def kernel_output_bytes_per_second(self) -> float | None:
        """Bytes of bfloat16 written per second of the decoder's time on the GPU."""
        return None if self.kernel_seconds is None else 2 * self.weights / self.kernel_seconds

    @property
    def kernel_share_of_limit(self) -> float | None:
        """The copy's time on the GPU over the decoder's: small tensors wait for the host."""
        if self.kernel_seconds is None or self.copy_kernel_seconds is None:
            return None
        return self.copy_kernel_seconds / self.kernel_seconds

    def as_json(self) -> dict[str, Any]:
        """All figures, the derived ones too."""
        derived = (
            "output_bytes_per_second",
            "limit_bytes_per_second",
            "share_of_limit",
            "kernel_output_bytes_per_second",
            "kernel_share_of_limit",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a scan over compressed blocks costs beyond their decoding.

    Attributes:
        name: the name of the block.
        blocks: the number of blocks that are scanned over.
        distinct_blocks: the number of different blocks among them.
        weights: the number of weights of one block.
        code_bits: the bits of the longest code.
        seconds: the seconds of one block in the scan, each time it was timed.
        decode_seconds: the seconds of one block in a program that only decodes.
        kernel_seconds: the seconds of one block's decoding in the scan, on the GPU alone; None if
            they are not known.
    """

    name: str
    blocks: int
    distinct_blocks: int
    weights: int
    code_bits: int
    seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    kernel_seconds: float | None

    @property
    def overhead(self) -> float:
        """The time of the scan over that of decoding alone, less 1."""
        return statistics.median(self.seconds) / statistics.median(self.decode_seconds) - 1

    @property
    def kernel_overhead(self) -> float | None:
        """The time of the scan over that of the decoder's kernels, less 1; None if not known."""
        if self.kernel_seconds is None:
            return None
        return statistics.median(self.seconds) / self.kernel_seconds - 1

    def as_json(self) -> dict[str, Any]:
        """All figures, the derived ones too."""
        derived = ("overhead", "kernel_overhead")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def measure_decoding(workload: Workload, effort: Effort) -> Decoding:
    """Times decoding, and copies that move as many bytes."""
    decode = decode_program(workload)
    copies = copy_programs(workload.moved_bytes, workload.slices)
    times = time_in_turn({"decode": decode, **copies}, effort)
    copy_seconds = {name: statistics.median(times[name]) for name in copies}
    fastest = min(copy_seconds, key=lambda name: copy_seconds[name])
    return Decoding(
        name=workload.name,
        weights=workload.weights,
        matrices=len(workload.arrays),
        code_bits=workload.code_bits,
        bits_per_weight=workload.bits_per_weight,
        seconds=tuple(times["decode"]),
        copy_bytes_per_second=workload.moved_bytes / copy_seconds[fastest],
        kernel_seconds=_kernel_seconds_per_call(decode),
        copy_kernel_seconds=_kernel_seconds_per_call(copies[fastest]),
    )


def measure_scan(workload: Workload, blocks: int, effort: Effort) -> Scan:
    """Times a scan over `blocks` blocks, the workload's in turn, and their decoding alone."""
    scan, decode = scan_program(repeat_slices(workload, blocks)), decode_program(workload)
    times = time_in_turn({"scan": scan, "decode": decode}, effort)
    return Scan(
        name=workload.name,
        blocks=blocks,
        distinct_blocks=workload.slices,
        weights=workload.weights,
        code_bits=workload.code_bits,
        seconds=tuple(times["scan"]),
        decode_seconds=tuple(times["decode"]),
        kernel_seconds=_kernel_seconds_per_call(scan, DECODE_KERNEL),
    )


def _kernel_seconds_per_call(program: Program, kernel: str = "") -> float | None:
    """The median over some profiles, without what is between kernels; None if not known."""
    runs = []
    for _ in range(_PROFILED_RUNS):
        kernels = profile_kernels(program)
        if kernels is None:
            return None
        seconds = [found.seconds for found in kernels if kernel in found.name]
        if not seconds:  # plain XLA operations decode, in kernels of any names
            return None
        runs.append(sum(seconds))
    return statistics.median(runs) / program.calls
