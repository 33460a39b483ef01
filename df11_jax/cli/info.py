"""The command `df11-jax info`."""

from pathlib import Path

import click

from df11_jax._units import format_bytes
from df11_jax.checkpoints.summary import Summary, summarize
from df11_jax.cli._checkpoints import describe_totals, open_source
from df11_jax.cli._options import PATH, examples, json_option, published_options
from df11_jax.cli._output import make_table, open_console, print_json


@click.command(
    short_help="What a checkpoint holds, and what it takes.",
    epilog=examples("info Qwen3-8B-df11", "info Qwen3-8B-DF11 --json"),
)
@click.argument("path", type=PATH)
@json_option
@published_options
def info(path: Path, as_json: bool, **published: Path | None) -> None:
    """Show what a checkpoint holds, and what it takes.

    PATH is a safetensors file or the directory of a model, plain, native or published (DFloat11),
    or the folder of an item that Orbax has saved. Only headers are read. Layers are added up: `*`
    stands for their number.
    """
    summary = summarize(open_source(path, **published))
    if as_json:
        print_json(summary.as_json())
    else:
        _print(summary)


def _print(summary: Summary) -> None:
    console = open_console()
    of = f" of the model type {summary.model_type}" if summary.model_type else ""
    console.print(f"{summary.path}: {summary.format} checkpoint{of}", soft_wrap=True)
    columns = ("tensors", "", "shape", "dtype", "format", "before", "now", "%")
    table = make_table(*columns, right=("", "before", "now", "%"))
    for group in summary.groups:
        table.add_row(
            group.pattern,
            f"x {group.count}" if group.count > 1 else "",
            "x".join(map(str, group.shape)) or "scalar",
            group.dtype,
            group.format,
            format_bytes(group.nbytes_before),
            format_bytes(group.nbytes),
            f"{100 * group.nbytes / max(1, group.nbytes_before):.1f}",
        )
    console.print(table)
    console.print(describe_totals(summary), soft_wrap=True)
