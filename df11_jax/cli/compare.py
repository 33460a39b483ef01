"""The command `df11-jax compare`."""

import json
import sys
from pathlib import Path

import click

from df11_jax._brief import printable
from df11_jax.cli._errors import DIFFERENT, FAILED, fail
from df11_jax.cli._options import COUNT, examples, json_option, memory_option, plot_option
from df11_jax.cli._output import save_plot, show_progress
from df11_jax.cli._require import require

_PARTS = ("compressed", "exact", "plain", "offloaded", "default", "cublas", "longest")


@click.command(
    short_help="Plain, compressed and offloaded weights, compared.",
    epilog=examples(
        "compare",
        "compare Llama-3.1-8B/config.json --memory 24GiB --plot compare.png",
        "compare Qwen3-8B --batch 1 --batch 16 --without offloaded --without longest --json",
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
@click.option(
    "--without",
    type=click.Choice(_PARTS),
    multiple=True,
    help="Leave out a kind of weights, one of XLA's two ways (default, cublas), or the longest "
    "contexts; may be given several times.",
)
@json_option
@plot_option
def compare(
    model: Path | None,
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    memory: int | None,
    without: tuple[str, ...],
    as_json: bool,
    plot: str | None,
) -> None:
    """Compare compressed weights with plain ones, and with plain ones partly in host memory.

    MODEL is a directory as Hugging Face lays it out, or a config.json, for random weights of its
    shapes. Without it, weights are random: of Llama-3.1-8B's shapes on a GPU, of a small model's on
    a CPU.

    On a GPU in two ways: by XLA's defaults, and with --xla_gpu_enable_triton_gemm=false in its
    flags, which makes cuBLAS read plain weights in place. Each has a process of its own.

    Reports tokens a second, memory of the device, and the longest context that fits into it, each
    row as soon as it is measured; --json, a line of JSON for each. Ends with status 1 unless tokens
    and logits of all that do the same products are the same, bit for bit.
    """
    require("models", "flax")
    from df11_jax.bench.compare import KINDS, compare_ways, kinds_by_way
    from df11_jax.bench.generation_figures import GenerationFigures
    from df11_jax.bench.one_way import Task

    task = Task(
        model=None if model is None else str(model),
        batches=batches,
        prompt=prompt,
        tokens=tokens,
        memory=memory,
        weights=[kind for kind in KINDS if kind not in without],
        longest="longest" not in without,
        progress=show_progress(),
    )
    if not kinds_by_way(task.weights, without):
        raise click.UsageError("--without leaves out everything: there is nothing to measure")
    figures = GenerationFigures()
    try:
        for event in compare_ways(task, without):
            data, lines = figures.take(event)
            if as_json:
                click.echo(json.dumps(data))
            else:
                click.echo(printable("".join(f"{line}\n" for line in lines), keep="\n"), nl=False)
    finally:  # also of what was interrupted
        if figures.rows:
            if as_json:
                click.echo(json.dumps(figures.summary_as_json()))
            else:
                click.echo(printable(figures.summary(), keep="\n"))
            if plot is not None:
                save_plot(figures.plot(), plot)
    if figures.errors:
        fail(FAILED, *figures.errors.values())
    if figures.differences:
        sys.exit(DIFFERENT)
