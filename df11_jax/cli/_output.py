"""What commands print: lines, tables and JSON, in which names and paths cannot do harm."""

import json
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from df11_jax._brief import printable
from df11_jax._files.atomic import new_file

# In a narrower terminal lines are broken, since columns of tables would lose what is in them.
_LEAST_WIDTH = 40


class Figures(Protocol):
    """The figures of `bench`."""

    def as_json(self) -> dict[str, Any]:
        """All figures, in types that JSON knows."""

    def plot(self) -> Any:
        """A figure of matplotlib."""


def echo(line: str) -> None:
    """Prints a line."""
    click.echo(printable(line))


class _Console(Console):
    """A console that shows strings as they are, each in one line."""

    def on_broken_pipe(self) -> None:
        raise  # to end like other commands; rich would end with status 1

    def render_str(self, text: str, **options: Any) -> Text:
        options |= {"highlight": False, "markup": False, "emoji": False}
        return super().render_str(printable(text), **options)


def open_console() -> Console:
    """A console on the standard output, which shows strings as they are, each in one line."""
    # What is not a terminal has no width to keep to.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    return _Console(width=max(_LEAST_WIDTH, width))


def make_table(*columns: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """A table without rows.

    Args:
        *columns: the head of each column; none is shown if all are empty.
        right: the columns that are aligned to the right.
        title: the line above the table.
    """
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def print_json(data: dict[str, Any]) -> None:
    """Prints JSON, for programs."""
    click.echo(json.dumps(data, indent=2))


def print_figures(figures: Figures, *, as_json: bool, plot: str | None) -> None:
    """Prints figures as JSON or text, and draws their plot to a file if there is to be one."""
    if as_json:
        print_json(figures.as_json())
    else:
        click.echo(printable(str(figures), keep="\n"))
    if plot is not None:
        save_plot(figures.plot(), plot)


def save_plot(figure: Any, path: str) -> None:
    """Draws a plot to a file, which replaces what is there when it is complete.

    Args:
        figure: a figure of matplotlib.
        path: the path of the file; one without a suffix gets that of matplotlib's default format.
    """
    format_ = os.path.splitext(path)[1][1:]
    if not format_:
        format_ = figure.canvas.get_default_filetype()
        path = f"{path.rstrip('.')}.{format_}"
    with new_file(Path(path)) as file:
        figure.savefig(file, format=format_)


def show_progress() -> bool:
    """Whether there is a standard error to show progress on."""
    return sys.stderr is not None
