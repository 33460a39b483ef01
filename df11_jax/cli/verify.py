"""The command `df11-jax verify`."""

from pathlib import Path

import click

from df11_jax._units import format_bytes
from df11_jax.checkpoints.differences import differences
from df11_jax.cli._checkpoints import open_source
from df11_jax.cli._errors import DIFFERENT, fail
from df11_jax.cli._options import PATH, examples, published_options
from df11_jax.cli._output import echo, show_progress


@click.command(
    short_help="Compare two checkpoints bit by bit.",
    epilog=examples("verify Qwen3-8B Qwen3-8B-df11"),
)
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@published_options
def verify(first: Path, second: Path, **published: Path | None) -> None:
    """Compare two checkpoints bit by bit, whatever their formats.

    Ends with status 0 if all tensors of A and B are the same, with 1 if not, and with 2 if they
    cannot be read. An lm_head that only one has is no difference if the other's config.json ties
    it to the embedding, and the bits are the same.
    """
    a, b = (open_source(path, **published) for path in (first, second))
    found = list(differences(a, b, progress=show_progress()))
    if found:
        fail(DIFFERENT, "the checkpoints differ:", *found)
    nbytes = sum(tensor.nbytes for tensor in a.tensors.values())
    echo(f"All {len(a.tensors)} tensors ({format_bytes(nbytes)}) are bit-identical.")
