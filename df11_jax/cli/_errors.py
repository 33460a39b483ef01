"""The end of commands that cannot do what they should: one line and a status, no traceback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import click

from df11_jax._files.directory import JOURNAL

# Exit codes. Click, too, ends with 2 if a command is used wrongly.
DIFFERENT = 1  # bits differ, or something does not work
FAILED = 2
DOES_NOT_FIT = 3
INTERRUPTED = 130


def fail(message: str, exit_code: int) -> NoReturn:
    """Ends the command with a message and a status."""
    failure = click.ClickException(message)
    failure.exit_code = exit_code  # type: ignore[misc]
    raise failure from None


@contextlib.contextmanager
def failures(target: Path | None = None) -> Iterator[None]:
    """Ends the command with a message for what can go wrong with files, models and devices.

    Args:
        target: the directory that is written, whose journal tells whether it is complete.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has seen enough; click ends quietly
    except OSError as error:
        if error.errno is None:  # one of ours, raised before anything was written
            fail(str(error), FAILED)
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror}{_what_is_left(target)}", FAILED)
    except (ValueError, ImportError, RuntimeError) as error:
        fail(f"{error}{_what_is_left(target)}", FAILED)
    except KeyboardInterrupt:
        fail(f"interrupted{_what_is_left(target)}", INTERRUPTED)


def _what_is_left(target: Path | None) -> str:
    if target is None or not (target / JOURNAL).exists():
        return ""
    return f"\n{target} is not complete; the same command goes on from there."
