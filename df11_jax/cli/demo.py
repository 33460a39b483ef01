"""The command `df11-jax demo`."""

from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from df11_jax._brief import printable
from df11_jax.cli._errors import DIFFERENT, fail
from df11_jax.cli._options import COUNT, TEMPERATURE, examples, prompt_option, seed_option
from df11_jax.cli._output import make_table, open_console, show_progress
from df11_jax.cli._require import require

if TYPE_CHECKING:  # it needs Flax
    from df11_jax.demo.run import Comparison

_MIB = 2**20


@click.command(
    short_help="A small model, plain and compressed, compared.",
    epilog=examples("demo", 'demo --prompt "A class definition " --tokens 100'),
)
@prompt_option(default='The "with" statement ', show_default=True)
@click.option("--tokens", type=COUNT, default=300, show_default=True, help="Bytes to generate.")
@click.option(
    "--temperature",
    type=TEMPERATURE,
    default=0.5,
    show_default=True,
    help="Temperature of the text that is shown; 0 takes the likeliest bytes.",
)
@seed_option
def demo(prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Generate text from a small model, with plain and with compressed weights, and compare.

    The bundled model (3 million parameters) writes something like Python's reference manual.
    Exits with an error unless logits and tokens are the same, bit for bit.
    """
    require("demo", "flax")
    from df11_jax.demo.run import BitMismatchError, run_demo

    try:
        comparison = run_demo(prompt, tokens, temperature, seed, progress=show_progress())
    except BitMismatchError as error:
        fail(DIFFERENT, str(error))
    _print(prompt, comparison)


def _print(prompt: str, comparison: "Comparison") -> None:
    console = open_console()
    texts = (printable(text, keep="\n\t") for text in (prompt, comparison.text))
    console.print(Text.assemble(*zip(texts, ("bold", ""), strict=True)), soft_wrap=True)
    console.print()
    console.print(_table(comparison))
    console.print(
        f"All {comparison.tokens} tokens and {comparison.logits:,} logits are bit-identical, "
        "sampled and greedy."
    )
    for remark in _remarks(comparison):
        console.print(remark)


def _table(comparison: "Comparison") -> Table:
    weights = comparison.weights
    title = f"{weights:,} weights on {comparison.platform}"
    columns = ("plain bf16", "compressed")
    table = make_table("", *columns, right=columns, title=title)
    both = (comparison.plain, comparison.compressed)
    for name, cells in (
        ("weights in memory", (f"{loop.weight_bytes / _MIB:.2f} MiB" for loop in both)),
        ("bits per weight", (f"{8 * loop.weight_bytes / weights:.2f}" for loop in both)),
        ("temporary memory, peak", (f"{loop.temporary_bytes / _MIB:.2f} MiB" for loop in both)),
        ("tokens per second", (f"{loop.tokens_per_second:.0f}" for loop in both)),
    ):
        table.add_row(name, *cells)
    return table


def _remarks(comparison: "Comparison") -> list[str]:
    plain, compressed = comparison.plain, comparison.compressed
    saved = 1 - compressed.weight_bytes / plain.weight_bytes
    speed = compressed.tokens_per_second / plain.tokens_per_second
    remarks = [
        f"The weights take {saved:.0%} less memory. Each token decodes all of them anew, and comes "
        f"at {speed:.2f} times the speed: a single sequence, as here, pays for that alone; a batch "
        "would share it."
    ]
    if comparison.platform == "cpu":
        remarks.append(
            "Most of the temporary memory on the left is a float32 copy of the plain weights, "
            "which XLA keeps because it multiplies bf16 as float32 on a CPU."
        )
    return remarks
