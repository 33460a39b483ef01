"""Progress, on the standard error: lines, and bars that count bytes or tokens."""

import sys
from time import monotonic
from typing import Any

from df11_jax._brief import printable
from df11_jax._units import format_bytes

_INTERVAL = 10.0  # seconds between lines


def say(line: str) -> None:
    """Prints a line, or several, at once; nothing if there is no standard error."""
    if sys.stderr is not None:  # `print` would take the standard output instead
        print(printable(line, keep="\n"), file=sys.stderr, flush=True)


class ProgressBar:
    """A tqdm bar on a terminal and in a notebook; elsewhere, lines from time to time; or nothing.

    Lines come ten seconds apart or more, the first after ten seconds: what is quick prints none.
    """

    def __init__(self, activity: str, total: int, *, unit: str = "B", show: bool) -> None:
        """Shows the bar.

        Args:
            activity: a verb that stands in front of the bar: "compress".
            total: what there is to do.
            unit: what is counted: "B" for bytes, or a noun in the plural.
            show: False for a bar that does nothing.
        """
        self._bar: Any = None
        if show:
            from tqdm import asyncio, auto

            # tqdm.auto has a class of its own in a notebook, whose stderr is no terminal either.
            if sys.stderr.isatty() or auto.tqdm is not asyncio.tqdm:
                bar_unit = "B" if unit == "B" else f" {unit}"
                self._bar = auto.tqdm(total=total, unit=bar_unit, unit_scale=True, desc=activity)
            else:
                self._bar = _Lines(activity, total, unit)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, name: str, count: int) -> None:
        """Counts bytes or tokens that are done.

        Args:
            name: what they are of, such as a tensor.
            count: how many.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(printable(name), refresh=False)
            self._bar.update(count)


class _Lines:
    """What tqdm's bar is for a terminal, for a pipe or a file."""

    def __init__(self, activity: str, total: int, unit: str) -> None:
        self._activity, self._total, self._unit = activity, total, unit
        self._name, self._done = "", 0
        self._began = self._printed = monotonic()

    def set_postfix_str(self, name: str, refresh: bool) -> None:
        self._name = name

    def update(self, count: int) -> None:
        self._done += count
        now = monotonic()
        if self._done and now - self._printed >= _INTERVAL:
            self._printed = now
            left = (now - self._began) * (self._total - self._done) / self._done
            percent = 100 * self._done // self._total
            time = _format_time(left)
            say(f"{self._activity}: {percent}%, {self._amounts()}, {time} left, at {self._name}")

    def close(self) -> None:
        """Prints nothing: what the job itself prints says that it is done."""

    def _amounts(self) -> str:
        if self._unit == "B":
            return f"{format_bytes(self._done)} of {format_bytes(self._total)}"
        return f"{self._done:,} of {self._total:,} {self._unit}"


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
