"""The measurements of `df11-jax bench --product`, and their order."""

from collections.abc import Mapping, Sequence

import jax

import df11_jax
from df11_jax._progress import say
from df11_jax.bench.blocks import BLOCKS, fitting_block
from df11_jax.bench.device import describe_device, free_bytes, read_clocks, read_clocks_under
from df11_jax.bench.product_figures import ProductFigures
from df11_jax.bench.product_measure import measure_product
from df11_jax.bench.product_programs import (
    compile_products,
    draw_rows,
    make_product_weights,
    product_memory_needed,
)
from df11_jax.bench.timing import Effort

ROWS = (1, 2, 4, 8, 16, 32, 64)
QUICK_ROWS = (1, 8, 64)
QUICK_MODELS = ("Llama-3.1-8B",)

# Of a block: what takes microseconds on a GPU takes milliseconds on a CPU.
_MOST_ON_CPU = 16 * 2**20


def run_product_bench(
    *, quick: bool, max_weights: int | None, models: Sequence[str] = ()
) -> ProductFigures:
    """Measures products with compressed weights on the default device, beside those with plain.

    Tells its progress on the standard error, each figure as soon as it is known.

    Args:
        quick: fewer models and numbers of rows, in less time.
        max_weights: the most weights of a block; None for as many as suit the device.
        models: the names of models in `BLOCKS`; empty for all, or for one if it is to be quick.

    Returns:
        The figures. Their errors say what failed, above all if products are wrong.
    """
    on_cpu = jax.default_backend() == "cpu"
    if max_weights is None:
        most = max(block.size for block in BLOCKS.values())
        max_weights = _MOST_ON_CPU if on_cpu else most
    if quick:
        effort = Effort(repeats=3, seconds=0.02, warm_up=0.02)
    else:
        effort = Effort(repeats=5, seconds=0.03, warm_up=0.05)

    figures = ProductFigures(df11_jax.__version__, jax.__version__, describe_device())
    figures.clocks["before"] = read_clocks()
    for model in models or (QUICK_MODELS if quick else BLOCKS):
        name, block = fitting_block(model, max_weights)
        for product, matrices in block.products.items():
            with figures.collect(f"{name}, {product}"):
                rows = QUICK_ROWS if quick else ROWS
                _measure(figures, name, product, matrices, rows, effort)
    figures.clocks["after"] = read_clocks()
    return figures


def _measure(
    figures: ProductFigures,
    model: str,
    product: str,
    matrices: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    effort: Effort,
) -> None:
    """Measures one product of a block with all numbers of rows."""
    name = f"{model}, {product}"
    needed = product_memory_needed(sum(k * n for k, n in matrices.values()))
    if not figures.fits(name, needed, free_bytes()):
        return
    say(f"{name} ...")
    weights = make_product_weights(name, matrices)
    if jax.default_backend() == "gpu" and "under load" not in figures.clocks:
        programs = compile_products(weights, draw_rows(weights, rows[0]))
        figures.clocks["under load"] = read_clocks_under(programs.compressed)
    for count in rows:
        with figures.collect(f"{name}, rows {count}"):
            found = measure_product(model, product, weights, count, effort)
            figures.products.append(found)
            say(
                f"  rows {count}: {1e6 * found.best_seconds:.1f} us, "
                f"{found.ratio:.3f} times plain weights"
            )
