"""The measurements of `df11-jax bench`, and their order."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

import df11_jax
from df11_jax._progress import say
from df11_jax.bench import peers
from df11_jax.bench.blocks import BLOCKS, fitting_block
from df11_jax.bench.decoding_figures import DecodingFigures
from df11_jax.bench.device import describe_device, free_bytes, read_clocks, read_clocks_under
from df11_jax.bench.measure import measure_decoding, measure_scan
from df11_jax.bench.programs import decode_program, memory_needed
from df11_jax.bench.timing import Effort
from df11_jax.bench.workload import make_workload, slices_beyond_cache

MEGA = 2**20
SIZES = tuple(MEGA * 4**i for i in range(6))  # 1 M to 1 G
QUICK_SIZES = (4 * MEGA, 64 * MEGA)
SCANNED = "Llama-3.1-8B"

# What takes seconds on a GPU takes minutes on a CPU.
_MOST_ON_CPU = 64 * MEGA


@dataclasses.dataclass(frozen=True)
class _Case:
    """Matrices to be decoded by one call."""

    name: str
    matrices: dict[str, tuple[int, int]]

    @property
    def weights(self) -> int:
        return sum(rows * cols for rows, cols in self.matrices.values())


def run_bench(*, quick: bool, max_weights: int | None) -> DecodingFigures:
    """Measures how fast the default device decodes; tells its progress on the standard error.

    Args:
        quick: fewer sizes, in less time.
        max_weights: the most weights of a tensor or a block; None for as many as suit the device.

    Returns:
        The figures. Their errors say what failed, above all if the device does not decode what was
        compressed.
    """
    on_cpu = jax.default_backend() == "cpu"
    if max_weights is None:
        max_weights = _MOST_ON_CPU if on_cpu else max(SIZES)
    if quick:
        effort = Effort(repeats=3, seconds=0.05, warm_up=0.1)
    else:
        effort = Effort(repeats=7, seconds=0.3 if on_cpu else 0.1, warm_up=0.3)

    figures = DecodingFigures(df11_jax.__version__, jax.__version__, describe_device())
    figures.clocks["before"] = read_clocks()
    for case in _cases(quick, max_weights):
        with figures.collect(case.name):
            _measure_decoding(figures, case, effort)
    with figures.collect("scan"):
        _measure_scan(figures, quick, max_weights, effort)
    figures.clocks["after"] = read_clocks()
    _measure_peers(figures, quick, max_weights, effort)
    return figures


def _cases(quick: bool, max_weights: int) -> Iterator[_Case]:
    sizes = [size for size in (QUICK_SIZES if quick else SIZES) if size <= max_weights]
    for size in sizes or [max_weights]:
        name = f"{size // MEGA} M" if size >= MEGA else f"{size // 1024} K"
        yield _Case(name, {name: _square(size)})
    for model in [SCANNED] if quick else BLOCKS:
        name, block = fitting_block(model, max_weights)
        yield _Case(name, block.matrices)


def _measure_decoding(figures: DecodingFigures, case: _Case, effort: Effort) -> None:
    slices = slices_beyond_cache(case.weights)
    if not figures.fits(case.name, memory_needed(case.weights, slices), free_bytes()):
        return
    say(f"{case.name} ...")
    workload = make_workload(case.name, case.matrices, slices)
    decoding = measure_decoding(workload, effort)
    figures.decodings.append(decoding)
    say(f"  {decoding.output_bytes_per_second / 1e9:.1f} GB/s out")
    if case.name == SCANNED:
        figures.clocks["under load"] = read_clocks_under(decode_program(workload))


def _measure_scan(
    figures: DecodingFigures,
    quick: bool,
    max_weights: int,
    effort: Effort,
) -> None:
    blocks = 8 if quick else BLOCKS[SCANNED].layers
    distinct = min(4, blocks)
    together = blocks if jax.default_backend() == "cpu" else 1
    name, block = fitting_block(SCANNED, max_weights, together)
    needed = memory_needed(block.size, distinct, blocks)
    if figures.fits(f"scan over {name}", needed, free_bytes()):
        say(f"scan over {blocks} blocks of {name} ...")
        workload = make_workload(name, block.matrices, distinct)
        figures.scan = measure_scan(workload, blocks, effort)


def _measure_peers(
    figures: DecodingFigures,
    quick: bool,
    max_weights: int,
    effort: Effort,
) -> None:
    figures.missing_peers = peers.missing_peers()
    size = min(max_weights, 64 * MEGA)
    block = fitting_block(SCANNED, max_weights)[1].size
    zipnn, dfloat11 = peers.measure_zipnn, functools.partial(peers.measure_dfloat11, effort=effort)
    wanted: dict[str, list[tuple[str, Callable[[], dict[str, Any]]]]] = {
        "cpu": [("ZipNN", functools.partial(zipnn, min(size, 16 * MEGA) if quick else size))],
        "gpu": [("DFloat11 kernel", functools.partial(dfloat11, n)) for n in (size, block)],
    }
    for name, measure in wanted.get(jax.default_backend(), []):
        if name in figures.missing_peers:
            continue
        say(f"{name} ...")
        try:
            figures.peers.append(measure())
        except Exception as error:
            # Whatever goes wrong in somebody else's library, our figures stand.
            figures.skipped[name] = f"{type(error).__name__}: {error}"


def _square(size: int) -> tuple[int, int]:
    cols = 2 ** math.ceil(math.log2(size) / 2)
    return max(1, size // cols), cols
