"""Times programs by the clock on the host, and kernels by the profiler."""

import dataclasses
import logging
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax

from df11_jax.bench.programs import Program

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: the number of timings of each program.
        seconds: the least seconds of each timing; the program runs as often as that takes.
        warm_up: the least seconds of running before that, for clocks to rise and caches to fill.
    """

    repeats: int
    seconds: float
    warm_up: float


def time_in_turn(programs: Mapping[str, Program], effort: Effort) -> dict[str, list[float]]:
    """Times programs in turn, so that whatever else the device does meets all alike.

    Args:
        programs: the programs by name.
        effort: the number and the length of the timings.

    Returns:
        The seconds of one call, as often as it was timed, for each program.
    """
    runs = {name: _runs_within(program, effort) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(effort.repeats):
        for name, program in programs.items():
            seconds = _time_runs(program, runs[name])
            times[name].append(seconds / (runs[name] * program.calls))
    return times


class Kernel(NamedTuple):
    """A kernel, or a copy, that a GPU has run."""

    name: str
    seconds: float


def kernel_durations(program: Program, kernel: str = "") -> list[float]:
    """The time that each of a GPU's kernels takes in one run, by the profiler.

    Args:
        program: the program to run.
        kernel: a part of the names of the kernels; empty for all kernels and copies.

    Returns:
        The seconds of each, without what is between them.

    Raises:
        RuntimeError: the profiler has not seen any kernel.
    """
    return [found.seconds for found in _profile(program) if kernel in found.name]


def profile_kernels(program: Program) -> list[Kernel] | None:
    """The kernels and copies of one run on a GPU, by the profiler.

    Args:
        program: the program to run.

    Returns:
        Each of them; None if the default device is no GPU, or the profiler lacks something.
    """
    if jax.default_backend() != "gpu":
        return None
    try:
        return _profile(program)
    except Exception as error:
        # The figures by the clock stand without those by the profiler, whatever it lacks here.
        _LOG.warning("no kernel times: %s", error)
        return None


def read_durations(profile: jax.profiler.ProfileData, kernel: str) -> list[float]:
    """The seconds of each kernel with `kernel` in its name, in what the profiler has written."""
    return [found.seconds for found in _read_kernels(profile) if kernel in found.name]


def _profile(program: Program) -> list[Kernel]:
    jax.block_until_ready(program.run())  # compiled, and loaded
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(program.run())
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return _read_kernels(jax.profiler.ProfileData.from_file(str(trace)))


def _read_kernels(profile: jax.profiler.ProfileData) -> list[Kernel]:
    kernels = [
        Kernel(event.name, event.duration_ns / 1e9)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")  # other lines sum these up
        for event in line.events
    ]
    if not kernels:
        raise RuntimeError("the profiler has seen no kernels (is CUPTI installed?)")
    return kernels


def _runs_within(program: Program, effort: Effort) -> int:
    """Warms up; returns the number of runs that take as long as the effort says."""
    jax.block_until_ready(program.run())
    runs, seconds, warm = 1, 0.0, 0.0
    while seconds < effort.seconds / 2 or warm < effort.warm_up:
        seconds = _time_runs(program, runs)
        warm += seconds
        if seconds < effort.seconds / 2:
            runs *= 2
    return max(1, round(runs * effort.seconds / seconds))


def _time_runs(program: Program, runs: int) -> float:
    # A GPU is sent the next run while it works; on a CPU, two would share its threads.
    wait_at_once = jax.default_backend() == "cpu"
    start = time.perf_counter()
    former = None
    for _ in range(runs):
        result = program.run()
        jax.block_until_ready(result if wait_at_once else former)
        former = result
    jax.block_until_ready(former)
    return time.perf_counter() - start
