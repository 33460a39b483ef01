"""The command `df11-jax compress`."""

from pathlib import Path

import click

from df11_jax._brief import listed
from df11_jax._layout import MAX_DIMS
from df11_jax._progress import say
from df11_jax._select import MIN_SIZE, is_candidate
from df11_jax._units import format_bytes
from df11_jax.checkpoints import Source, TensorInfo
from df11_jax.checkpoints.cast import CastCheckpoint
from df11_jax.checkpoints.convert import write_native, write_orbax
from df11_jax.checkpoints.detect import find_quantization
from df11_jax.cli._checkpoints import open_source, print_outcome, read_patterns, require_directory
from df11_jax.cli._errors import resumable
from df11_jax.cli._options import PATH, examples, published_options
from df11_jax.cli._output import echo, show_progress


@click.command(
    short_help="Compress a checkpoint to a new directory or file.",
    epilog=examples(
        "compress Qwen3-8B Qwen3-8B-native",
        "compress Qwen3-8B Qwen3-8B-DF11 --format published",
        "compress Qwen3-8B-DF11 Qwen3-8B-native",
        "compress lora.safetensors lora-native.safetensors",
        "compress Qwen3-8B-DF11 Qwen3-8B-orbax --format orbax",
        "compress Llama-2-7b Llama-2-7b-native --cast",
    ),
)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("target", metavar="DST", type=PATH)
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
@click.option(
    "--cast",
    is_flag=True,
    help="Round all float32 and float16 tensors to bfloat16, which changes results. Without it, a "
    "checkpoint that has no others to compress is refused.",
)
@published_options
def compress(
    source: Path,
    target: Path,
    format_: str,
    verify: bool,
    cast: bool,
    pattern_dict: Path | None,
    shapes: Path | None,
) -> None:
    """Compress the checkpoint SRC to the new directory DST.

    SRC is a safetensors file or the directory of a model, in another format than DST is to have:
    a published checkpoint is transcoded to the native format. Tokenizer, configuration and the
    like are copied, folders are not. If SRC is a file, DST may be one as well, OUT.safetensors.

    If this is interrupted, the same command goes on from there. (With Orbax, it starts anew, the
    weights alone are written, and they are in memory at once, compressed.)
    """
    checkpoint = open_source(source, shapes, pattern_dict)
    if checkpoint.format == "orbax":
        raise ValueError(
            f"{source}: is an Orbax checkpoint, and which of its leaves are stacks of layers only "
            "its owner knows. Compress it in Python: checkpoints.save(compress_params("
            "checkpoints.load(SRC), stacked=...), DST)"
        )
    if checkpoint.format == format_:
        raise ValueError(f"{source}: is in the {format_} format already")
    if cast:
        checkpoint = CastCheckpoint(checkpoint)
    elif not any(map(_is_candidate, checkpoint.tensors.values())) and (
        others := _floats(checkpoint)
    ):
        raise ValueError(
            f"{source}: has no bfloat16 tensors to compress, and {others}. With --cast they are "
            "rounded to bfloat16, to 8 significant bits, which changes results"
        )
    with resumable(target):
        if format_ == "native":
            write_native(checkpoint, target, verify=verify, progress=show_progress())
        elif format_ == "orbax":
            require_directory(target)
            write_orbax(checkpoint, target, progress=show_progress())
        else:
            require_directory(target)
            _write_published(checkpoint, target, pattern_dict)
    written = print_outcome(checkpoint, target)
    if isinstance(checkpoint, CastCheckpoint):
        _print_rounded(checkpoint)
    if format_ != "published" and written.nbytes == written.nbytes_before:
        say(_why_not(checkpoint))
    if others := _floats(checkpoint):
        say(f"{others}, left as in {source}; --cast rounds to bfloat16")


def _write_published(source: Source, target: Path, pattern_dict: Path | None) -> None:
    from df11_jax import published

    config = source.model_config()
    if pattern_dict is None:
        patterns = published.default_pattern_dict(config)
    else:
        patterns = read_patterns(pattern_dict)
    published.write(source, target, patterns, config=config, progress=show_progress())


def _print_rounded(source: CastCheckpoint) -> None:
    rounded = source.rounded
    counts = zip((0, 0, 0), *rounded.values(), strict=True)
    weights, changed, infinite = map(sum, counts)
    echo(
        f"rounded to bfloat16: {len(rounded):,} tensors, {weights:,} weights, of which {changed:,} "
        f"({changed / max(1, weights):.1%}) changed"
    )
    if before := source.casts - len(rounded):
        say(f"{before:,} more tensors were rounded before the interruption.")
    if infinite:
        names = [name for name, of_tensor in rounded.items() if of_tensor.infinite]
        say(
            f"{infinite:,} weights are beyond the largest bfloat16, 3.39e38, and became infinite: "
            f"in {listed(names)}"
        )


def _floats(source: Source) -> str:
    """Says which tensors would be compressed if they were not float32 or float16."""
    others = [
        info
        for info in source.tensors.values()
        if not _is_candidate(info) and is_candidate(info.shape, info.numpy_dtype, cast=True)
    ]
    # Those of a quantized model are scales, which are not to be rounded.
    if not others or find_quantization(source.tensors, source.model_config()):
        return ""
    types = " or ".join(sorted({str(info.numpy_dtype) for info in others}))
    count, verb = (f"{len(others):,} tensors", "are") if len(others) > 1 else ("1 tensor", "is")
    return f"{count} ({format_bytes(sum(info.nbytes for info in others))}) {verb} {types}"


def _is_candidate(info: TensorInfo) -> bool:
    return is_candidate(info.shape, info.numpy_dtype)


def _why_not(source: Source) -> str:
    """Why nothing became smaller."""
    reason = (
        f"Nothing got smaller: only bfloat16 tensors of {MIN_SIZE:,} weights and more, and of up "
        f"to {MAX_DIMS} dimensions, do"
    )
    if method := find_quantization(source.tensors, source.model_config()):
        return f"{reason}, and the model is quantized already ({method})."
    return f"{reason}."
