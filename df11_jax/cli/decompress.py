"""The command `df11-jax decompress`."""

from pathlib import Path

import click

from df11_jax.checkpoints.convert import write_plain
from df11_jax.cli._checkpoints import open_source, print_outcome
from df11_jax.cli._errors import resumable
from df11_jax.cli._options import PATH, examples, published_options
from df11_jax.cli._output import show_progress


@click.command(
    short_help="Decompress a checkpoint to plain safetensors.",
    epilog=examples("decompress Qwen3-8B-DF11 Qwen3-8B"),
)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("target", metavar="DST", type=PATH)
@published_options
def decompress(source: Path, target: Path, **published: Path | None) -> None:
    """Decompress the checkpoint SRC to the new directory DST, as other programs read it.

    SRC is a native or published checkpoint, or a folder of Orbax. What comes out are safetensors
    files, bit for bit what was compressed. If SRC is a file, DST may be one as well,
    OUT.safetensors.

    If this is interrupted, the same command goes on from there.
    """
    checkpoint = open_source(source, **published)
    if checkpoint.format == "plain":
        raise ValueError(f"{source}: is not compressed")
    with resumable(target):
        write_plain(checkpoint, target, progress=show_progress())
    print_outcome(checkpoint, target)
