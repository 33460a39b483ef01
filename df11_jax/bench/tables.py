"""Figures as lines of text."""

from collections.abc import Sequence
from typing import Any


def format_device(device: dict[str, Any]) -> str:
    """The line for a device: its name, and all else that is known of it."""
    rest = ", ".join(f"{key} {value}" for key, value in device.items() if key != "name")
    return f"{device['name']} ({rest})"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right.

    The last columns are left out if all their cells are empty.
    """
    while rows and not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip()
        for cells in (zip(row, widths, strict=True) for row in (head, *rows))
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
