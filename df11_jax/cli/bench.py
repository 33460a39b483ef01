"""The command `df11-jax bench`."""

import click

from df11_jax.cli._errors import DIFFERENT, fail
from df11_jax.cli._options import examples, json_option, plot_option
from df11_jax.cli._output import print_figures


@click.command(
    short_help="How fast this device decompresses.",
    epilog=examples("bench --quick", "bench --json --plot bench.png"),
)
@click.option("--quick", is_flag=True, help="Fewer sizes, in less time.")
@click.option(
    "--max-weights", type=click.IntRange(min=2**16), help="Most weights of a tensor or a block."
)
@json_option
@plot_option
def bench(quick: bool, max_weights: int | None, as_json: bool, plot: str | None) -> None:
    """Measure how fast this device decompresses, and what its memory would allow.

    Over tensors of 1 M to 1 G weights and the transformer blocks of four models, as far as memory
    allows (up to 64 M weights on a CPU), with other decoders beside it where they are installed.
    """
    from df11_jax.bench.decoding import run_bench

    figures = run_bench(quick=quick, max_weights=max_weights)
    print_figures(figures, as_json=as_json, plot=plot)
    if figures.errors:
        fail(DIFFERENT, "; ".join(figures.errors.values()))
