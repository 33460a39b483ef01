"""The command `df11-jax bench`."""

import click

from df11_jax.cli._errors import DIFFERENT, fail
from df11_jax.cli._options import examples, json_option, plot_option
from df11_jax.cli._output import print_figures


@click.command(
    short_help="How fast this device decompresses, and multiplies.",
    epilog=examples(
        "bench --quick",
        "bench --json --plot bench.png",
        "bench --product --model Llama-3.1-8B",
    ),
)
@click.option("--quick", is_flag=True, help="Fewer sizes, models and rows, in less time.")
@click.option(
    "--max-weights", type=click.IntRange(min=2**16), help="Most weights of a tensor or a block."
)
@click.option(
    "--product",
    "is_product",
    is_flag=True,
    help="Measure products with compressed weights instead, beside those with plain weights.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="With --product, a model to measure, such as Llama-3.1-8B; may be repeated.  "
    "[default: all]",
)
@json_option
@plot_option
def bench(
    quick: bool,
    max_weights: int | None,
    is_product: bool,
    models: tuple[str, ...],
    as_json: bool,
    plot: str | None,
) -> None:
    """Measure how fast this device decompresses, and what its memory would allow.

    Over tensors of 1 M to 1 G weights and the transformer blocks of four models, as far as memory
    allows (up to 64 M weights on a CPU), with other decoders beside it where they are installed.

    With --product: how long the products of these blocks take with 1 to 64 rows, compressed and
    plain (by cuBLAS on a GPU), on a CPU with smaller blocks. All results are compared before.
    """
    from df11_jax.bench.blocks import BLOCKS
    from df11_jax.bench.decoding import run_bench
    from df11_jax.bench.product import run_product_bench

    if models and not is_product:
        raise click.UsageError("--model is for --product")
    for model in models:
        if model not in BLOCKS:
            raise click.BadParameter(
                f"there is no {model}: expected {', '.join(BLOCKS)}", param_hint="--model"
            )
    figures = (
        run_product_bench(quick=quick, max_weights=max_weights, models=models)
        if is_product
        else run_bench(quick=quick, max_weights=max_weights)
    )
    print_figures(figures, as_json=as_json, plot=plot)
    if figures.errors:
        fail(DIFFERENT, "; ".join(figures.errors.values()))
