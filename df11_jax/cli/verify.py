"""The command `df11-jax verify`."""

from pathlib import Path

import click

from df11_jax._units import format_bytes
from df11_jax.checkpoints.differences import differences, read_all
from df11_jax.cli._checkpoints import open_source
from df11_jax.cli._errors import DIFFERENT, fail
from df11_jax.cli._options import PATH, examples, published_options
from df11_jax.cli._output import echo, show_progress

_NO_CHECKSUMS = "this format has no checksums: compare them with others, as `df11-jax verify A B`."
_CHECKED = {
    "native": "all checksums are right.",
    "orbax": "all checksums are right that it has: df11_jax writes one for each, Orbax alone none.",
    "plain": _NO_CHECKSUMS,
    "published": _NO_CHECKSUMS,
}


@click.command(
    short_help="Compare two checkpoints bit by bit, or check one.",
    epilog=examples("verify Qwen3-8B Qwen3-8B-df11", "verify Qwen3-8B-df11"),
)
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="[B]", type=PATH, required=False)
@published_options
def verify(first: Path, second: Path | None, **published: Path | None) -> None:
    """Compare two checkpoints bit by bit, whatever their formats; or verify the checksums of one.

    Ends with status 0 if all tensors of A and B are the same, with 1 if not, and with 2 if they
    cannot be read, or are damaged. An lm_head that only one has is no difference if the other's
    config.json ties it to the embedding, and the bits are the same.
    """
    a = open_source(first, **published)
    tensors = f"All {len(a.tensors)} tensors"
    size = format_bytes(sum(tensor.nbytes for tensor in a.tensors.values()))
    if second is None:
        read_all(a, progress=show_progress())
        echo(f"{tensors} ({size}) can be read, and {_CHECKED[a.format]}")
        return
    found = list(differences(a, open_source(second, **published), progress=show_progress()))
    if found:
        fail(DIFFERENT, "the checkpoints differ:", *found)
    echo(f"{tensors} ({size}) are bit-identical.")
