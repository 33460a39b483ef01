"""The command `df11-jax compare`."""

import sys
from pathlib import Path

import click

from df11_jax.cli._errors import DIFFERENT
from df11_jax.cli._options import COUNT, examples, json_option, memory_option, plot_option
from df11_jax.cli._output import print_figures, show_progress
from df11_jax.cli._require import require


@click.command(
    short_help="Plain, compressed and offloaded weights, compared.",
    epilog=examples(
        "compare",
        "compare Llama-3.1-8B/config.json --memory 24GiB --plot compare.png",
        "compare Qwen3-8B --batch 1 --batch 16 --json",
    ),
)
@click.argument("model", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--batch",
    "batches",
    type=COUNT,
    multiple=True,
    help="Number of prompts at a time; may be given several times. [default: 1, 8, 64, 256; on a "
    "CPU 1, 8]",
)
@click.option(
    "--prompt-length",
    "prompt",
    type=COUNT,
    default=128,
    show_default=True,
    help="Tokens of each prompt.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens to generate after each prompt.",
)
@memory_option("Nothing that takes more is run. [default: what is free of this device]")
@json_option
@plot_option
def compare(
    model: Path | None,
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    memory: int | None,
    as_json: bool,
    plot: str | None,
) -> None:
    """Compare compressed weights with plain ones, and with plain ones partly in host memory.

    MODEL is a directory as Hugging Face lays it out, or a config.json, for random weights of its
    shapes. Without it, weights are random: of Llama-3.1-8B's shapes on a GPU, of a small model's on
    a CPU.

    Reports tokens a second, memory of the device, and the longest context that fits into it. Ends
    with status 1 unless tokens and logits of all are the same, bit for bit.
    """
    require("models", "flax")
    from df11_jax.bench.compare import run_compare

    figures = run_compare(
        model,
        batches=batches,
        prompt=prompt,
        tokens=tokens,
        memory=memory,
        progress=show_progress(),
    )
    print_figures(figures, as_json=as_json, plot=plot)
    if figures.differences:
        sys.exit(DIFFERENT)
