"""What the commands that work on checkpoints share."""

from pathlib import Path
from typing import Any

from df11_jax._brief import brief, listed
from df11_jax._files.directory import left_beside, read_json
from df11_jax._files.folder_source import FolderSource
from df11_jax._progress import say
from df11_jax._units import format_bytes
from df11_jax.checkpoints import Source, open_checkpoint
from df11_jax.checkpoints.summary import Summary, summarize
from df11_jax.cli._output import echo
from df11_jax.published.detect import CONFIG_KEY


def open_source(path: Path, shapes: Path | None, pattern_dict: Path | None) -> Source:
    """Opens a checkpoint with what the options for published ones tell of it."""
    patterns = None if pattern_dict is None else read_patterns(pattern_dict)
    return open_checkpoint(path, shapes=shapes, pattern_dict=patterns)


def read_patterns(path: Path) -> dict[str, Any]:
    """Reads the file of `--pattern-dict`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no JSON object.
    """
    patterns = read_json(path)
    # Perhaps it is the config.json of a checkpoint of that model.
    for key in (CONFIG_KEY, "pattern_dict"):
        patterns = patterns.get(key, patterns)
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} is {brief(patterns)}, expected a JSON object")
    return patterns


def require_directory(target: Path) -> None:
    """Raises ValueError if a path is that of a file."""
    if target.suffix == ".safetensors":
        raise ValueError(f"{target}: is a name for a file; expected that of a new directory")


def print_outcome(source: Source, target: Path) -> Summary:
    """Prints what was written, in one line, and what was not; returns a summary of the first."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    summary = summarize(open_checkpoint(target, shapes=shapes))
    echo(f"{target}: {summary.format}, {describe_totals(summary)}")
    # To Orbax's folders, weights alone are written.
    if isinstance(source, FolderSource) and summary.format != "orbax":
        if left := left_beside(source.folder):
            say(f"In {source.path}, neither read nor copied: {listed(left)}")
    return summary


def describe_totals(summary: Summary) -> str:
    """The number of tensors, their size, and the bits of each weight."""
    before, now = summary.nbytes_before, summary.nbytes
    share = f" ({now / before:.1%} of {format_bytes(before)})" if now != before else ""
    return (
        f"{summary.tensors:,} tensors, {format_bytes(now)}{share}, "
        f"{summary.bits_per_weight:.2f} bits per weight"
    )
