"""The commands of `df11-jax` that work on checkpoints: info, compress, decompress, verify."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from df11_jax._files.directory import read_config, read_json
from df11_jax._select import MIN_SIZE, is_candidate
from df11_jax._units import format_bytes
from df11_jax.checkpoints import Source, open_checkpoint
from df11_jax.checkpoints.convert import write_native, write_orbax, write_plain
from df11_jax.checkpoints.differences import differences
from df11_jax.checkpoints.summary import Summary, summarize
from df11_jax.cli._errors import DIFFERENT, fail, failures
from df11_jax.published.detect import CONFIG_KEY

_COMPRESS_EXAMPLES = """\b
Examples:
  df11-jax compress Qwen3-8B Qwen3-8B-native
  df11-jax compress Qwen3-8B Qwen3-8B-DF11 --format published
  df11-jax compress Qwen3-8B-DF11 Qwen3-8B-native
  df11-jax compress Qwen3-8B-DF11 Qwen3-8B-orbax --format orbax
"""

_path = click.Path(path_type=Path)


def _published_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a published checkpoint does not tell if it lacks its config.json."""
    shapes = click.option(
        "--shapes",
        type=click.Path(exists=True, path_type=Path),
        help="The original model; its headers tell the shapes of a published checkpoint whose own "
        "config.json does not.",
    )
    pattern_dict = click.option(
        "--pattern-dict",
        type=click.Path(exists=True, path_type=Path),
        help="JSON file that tells the units of a published checkpoint: of one to be written, for "
        "model types without a default, or of one that lacks its config.json. The config.json of a "
        "DFloat11 checkpoint is such a file.",
    )
    return shapes(pattern_dict(command))


@click.command(
    short_help="What a checkpoint holds, and what it takes.",
    epilog="\b\nExamples:\n  df11-jax info Qwen3-8B-df11\n  df11-jax info Qwen3-8B-DF11 --json",
)
@click.argument("path", type=_path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@_published_options
def info(path: Path, as_json: bool, **published: Path | None) -> None:
    """Show what a checkpoint holds, and what it takes.

    PATH is a safetensors file or the directory of a model, plain, native or published (DFloat11),
    or the folder of an item that Orbax has saved. Only headers are read. Layers are added up: `*`
    stands for their number.
    """
    with failures():
        summary = summarize(_open(path, **published))
    if as_json:
        click.echo(json.dumps(summary.as_json(), indent=2))
    else:
        _print_summary(summary)


@click.command(short_help="Compress a checkpoint to a new directory.", epilog=_COMPRESS_EXAMPLES)
@click.argument("source", metavar="SRC", type=_path)
@click.argument("target", metavar="DST", type=_path)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["native", "published", "orbax"]),
    default="native",
    show_default=True,
    help="What to write: df11_jax's own format, that of DFloat11's checkpoints, or Orbax's.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Decode each tensor, and compare it bit by bit before it is written. (Only for the "
    "native format; the others are always verified.)",
)
@_published_options
def compress(
    source: Path,
    target: Path,
    format_: str,
    verify: bool,
    pattern_dict: Path | None,
    shapes: Path | None,
) -> None:
    """Compress the checkpoint SRC to the new directory DST.

    SRC is a safetensors file or the directory of a model, in another format than DST is to have:
    a published checkpoint is transcoded to the native format. Tokenizer, configuration and the
    like are copied. If this is interrupted, the same command goes on from there. (With Orbax, it
    starts anew, the weights alone are written, and they are in memory at once, compressed.)
    """
    with failures(target):
        checkpoint = _open(source, shapes, pattern_dict)
        if checkpoint.format == format_:
            raise ValueError(f"{source}: is in the {format_} format already")
        _require_directory(target)
        if checkpoint.format == "orbax":
            raise ValueError(
                f"{source}: is an Orbax checkpoint, whose leaves may be stacks of layers. Convert "
                "it in Python, with df11_jax.checkpoints.load and save"
            )
        if format_ == "native":
            write_native(checkpoint, target, verify=verify, progress=_progress())
        elif format_ == "orbax":
            write_orbax(checkpoint, target, progress=_progress())
        else:
            _write_published(checkpoint, target, pattern_dict)
        _print_outcome(checkpoint, target)


@click.command(
    short_help="Decompress a checkpoint to plain safetensors.",
    epilog="\b\nExample:\n  df11-jax decompress Qwen3-8B-DF11 Qwen3-8B",
)
@click.argument("source", metavar="SRC", type=_path)
@click.argument("target", metavar="DST", type=_path)
@_published_options
def decompress(source: Path, target: Path, **published: Path | None) -> None:
    """Decompress the checkpoint SRC to the new directory DST, as other programs read it.

    SRC is a native or published checkpoint. What comes out are safetensors files, bit for bit what
    was compressed. If this is interrupted, the same command goes on from there.
    """
    with failures(target):
        checkpoint = _open(source, **published)
        if checkpoint.format == "plain":
            raise ValueError(f"{source}: is not compressed")
        _require_directory(target)
        write_plain(checkpoint, target, progress=_progress())
        _print_outcome(checkpoint, target)


@click.command(
    short_help="Compare two checkpoints bit by bit.",
    epilog="\b\nExample:\n  df11-jax verify Qwen3-8B Qwen3-8B-df11",
)
@click.argument("first", metavar="A", type=_path)
@click.argument("second", metavar="B", type=_path)
@_published_options
def verify(first: Path, second: Path, **published: Path | None) -> None:
    """Compare two checkpoints bit by bit, whatever their formats.

    Ends with status 0 if all tensors of A and B are the same, with 1 if not, and with 2 if they
    cannot be read. An lm_head that only one has is no difference if the other's config.json ties
    it to the embedding, and the bits are the same.
    """
    with failures():
        a, b = (_open(path, **published) for path in (first, second))
        found = list(differences(a, b, progress=_progress()))
    if found:
        fail("\n".join(("the checkpoints differ:", *found)), DIFFERENT)
    nbytes = sum(tensor.nbytes for tensor in a.tensors.values())
    click.echo(f"All {len(a.tensors)} tensors ({format_bytes(nbytes)}) are bit-identical.")


def _open(path: Path, shapes: Path | None, pattern_dict: Path | None) -> Source:
    patterns = None if pattern_dict is None else _read_patterns(pattern_dict)
    return open_checkpoint(path, shapes=shapes, pattern_dict=patterns)


def _read_patterns(path: Path) -> dict[str, Any]:
    patterns = read_json(path)
    # Perhaps it is the config.json of a checkpoint of that model.
    for key in (CONFIG_KEY, "pattern_dict"):
        patterns = patterns.get(key, patterns)
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} is {patterns!r:.80}, expected a JSON object")
    return patterns


def _write_published(source: Source, target: Path, pattern_dict: Path | None) -> None:
    from df11_jax import published

    config = read_config(source.path)
    if pattern_dict is None:
        patterns = published.default_pattern_dict(config)
    else:
        patterns = _read_patterns(pattern_dict)
    published.write(source, target, patterns, config=config, progress=_progress())


def _require_directory(target: Path) -> None:
    if target.suffix == ".safetensors":
        raise ValueError(f"{target}: is a name for a file; expected that of a new directory")


def _progress() -> bool:
    return sys.stderr.isatty()


def _print_outcome(source: Source, target: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    summary = summarize(open_checkpoint(target, shapes=shapes))
    click.echo(f"{target}: {summary.format}, {_totals(summary)}")
    if summary.format in ("native", "orbax") and summary.nbytes == summary.nbytes_before:
        click.echo(_why_not(source), err=True)


def _why_not(source: Source) -> str:
    """Why nothing became smaller."""
    reason = f"Nothing got smaller: only bfloat16 tensors of {MIN_SIZE:,} weights and more do"
    others = [
        info
        for info in source.tensors.values()
        if not is_candidate(info.shape, info.numpy_dtype)
        and is_candidate(info.shape, info.numpy_dtype, cast=True)
    ]
    if not others:
        return f"{reason}."
    types = " or ".join(sorted({str(info.numpy_dtype) for info in others}))
    size = format_bytes(sum(info.nbytes for info in others))
    return (
        f"{reason}, and {len(others):,} ({size}) are {types}. To round them to bfloat16, which "
        "changes results, in Python: compress_params(checkpoints.load(SRC), cast=True)"
    )


def _totals(summary: Summary) -> str:
    before, now = summary.nbytes_before, summary.nbytes
    share = f" ({now / before:.1%} of {format_bytes(before)})" if now != before else ""
    return (
        f"{summary.tensors:,} tensors, {format_bytes(now)}{share}, "
        f"{summary.bits_per_weight:.2f} bits per weight"
    )


def _print_summary(summary: Summary) -> None:
    of = f" of the model type {summary.model_type}" if summary.model_type else ""
    # What is not a terminal has no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"{summary.path}: {summary.format} checkpoint{of}", soft_wrap=True)
    table = Table()
    for column in ("tensors", "", "shape", "dtype", "format", "before", "now", "%"):
        numeric = column in ("", "before", "now", "%")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for group in summary.groups:
        table.add_row(
            Text(group.pattern),
            f"x {group.count}" if group.count > 1 else "",
            "x".join(map(str, group.shape)) or "scalar",
            group.dtype,
            group.format,
            format_bytes(group.nbytes_before),
            format_bytes(group.nbytes),
            f"{100 * group.nbytes / max(1, group.nbytes_before):.1f}",
        )
    console.print(table)
    console.print(_totals(summary), soft_wrap=True)
