"""The end of commands that cannot do what they should: one line and a status, no traceback."""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import click

from df11_jax._brief import printable
from df11_jax._files.directory import JOURNAL

# Exit codes. Click, too, ends with 2 if a command is used wrongly.
DIFFERENT = 1  # bits differ, or something does not work
FAILED = 2
DOES_NOT_FIT = 3
INTERRUPTED = 128 + signal.SIGINT

_TRACEBACK = "DF11_JAX_TRACEBACK"
_NO_NAME = (None, os.strerror(errno.ENOENT))
_NOTE = "df11_jax: "  # what notes of ours begin with


class _Failure(click.ClickException):
    """The end of a command, with a status that does not depend on who reads the message."""

    def show(self, file: IO[Any] | None = None) -> None:
        with contextlib.suppress(OSError):
            super().show(file)


def fail(exit_code: int, *lines: str) -> NoReturn:
    """Ends the command with a message of one line or several, and a status."""
    failure = _Failure("\n".join(map(printable, lines)))
    failure.exit_code = exit_code  # type: ignore[misc]
    raise failure from None


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turns every exception of a command into a message and a status."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # the help itself
        raise
    except click.UsageError as error:  # repeats arguments
        error.message = printable(error.message)  # type: ignore[misc]
        raise
    except (SystemExit, click.exceptions.Exit, click.ClickException):
        raise
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left of it must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except BaseException as error:  # panics of Rust are no `Exception`
        if os.environ.get(_TRACEBACK):
            click.echo(printable(traceback.format_exc(), keep="\n"), err=True)
        # A module in C++ that is interrupted while it is imported raises an ImportError for it.
        # JAX gives an interrupt a cause of its own: the line of the program that it was lowering.
        interrupted = any(isinstance(e, KeyboardInterrupt) for e in (error, error.__cause__))
        notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE))
        fail(
            INTERRUPTED if interrupted else FAILED,
            "interrupted" if interrupted else _describe(error),
            *(note.removeprefix(_NOTE) for note in notes),
        )


@contextlib.contextmanager
def resumable(target: Path) -> Iterator[None]:
    """Notes on exceptions that the same command goes on, if it does.

    Args:
        target: the directory that is written, whose journal tells whether it is complete.
    """
    try:
        yield
    except (FileExistsError, BlockingIOError):  # what is there is that of another command
        raise
    except BaseException as error:
        if os.path.lexists(target / JOURNAL):
            error.add_note(f"{_NOTE}{target} is not complete; the same command goes on from there.")
        raise


def _describe(error: BaseException) -> str:
    said = str(error)
    if isinstance(error, FileNotFoundError) and (error.filename, error.strerror) == _NO_NAME:
        # Of what the system looks for, the current directory alone has no name.
        return "the current directory is not there any more: change to one that is"
    if isinstance(error, OSError) and error.strerror:  # none of ours, which are texts
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, AssertionError) and not said:  # as JAX's, where there is no device
        from df11_jax._host_arrays import start_backends

        try:
            start_backends()
        except RuntimeError as reason:
            return str(reason)
    if isinstance(error, MemoryError):
        return f"not enough memory{said and f': {said}'}"
    is_expected = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
    if said and is_expected and not isinstance(error, RecursionError):
        return said
    return (
        f"{type(error).__name__}: {said}. This is a bug of df11_jax: please report it, with the "
        f"traceback that {_TRACEBACK}=1 in the environment shows"
    )
