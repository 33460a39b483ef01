"""What commands print: tables and JSON."""

import json
import sys
from collections.abc import Collection
from typing import Any, Protocol

import click
from rich.console import Console
from rich.table import Table


class Figures(Protocol):
    """The figures of `bench` or `compare`."""

    def as_json(self) -> dict[str, Any]:
        """All figures, in types that JSON knows."""

    def plot(self) -> Any:
        """A figure of matplotlib."""


def open_console() -> Console:
    """A console on the standard output, which shows text as it is."""
    # What is not a terminal has no width to keep to.
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False, emoji=False)


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
        click.echo(str(figures))
    if plot is not None:
        figures.plot().savefig(plot)


def show_progress() -> bool:
    """Whether there is a standard error to show progress on."""
    return sys.stderr is not None
