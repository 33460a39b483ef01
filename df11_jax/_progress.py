"""Progress, on the standard error: lines, and bars that count bytes."""

import sys
from typing import Any

from df11_jax._brief import printable


def say(line: str) -> None:
    """Prints a line, or several, at once."""
    print(printable(line, keep="\n"), file=sys.stderr, flush=True)


class ProgressBar:
    """A tqdm bar on the standard error, or nothing."""

    def __init__(self, activity: str, total: int, *, show: bool) -> None:
        """Shows the bar.

        Args:
            activity: a verb that stands in front of the bar: "compress".
            total: the number of bytes to go.
            show: False for a bar that does nothing.
        """
        self._bar: Any = None
        if show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=activity)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, name: str, nbytes: int) -> None:
        """Counts a tensor that is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(printable(name), refresh=False)
            self._bar.update(nbytes)
