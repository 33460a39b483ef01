"""The command line, `df11-jax`: a module for each command, named like it."""

import contextlib
import io
import os
import signal
import sys
from typing import Any

from df11_jax.cli._require import require


def main() -> None:
    """Runs the command line; says what to install if that is missing."""
    require("cli", "click", "packaging", "rich")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again
    try:
        from df11_jax.cli._commands import commands
        from df11_jax.cli._errors import FAILED, INTERRUPTED
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        os._exit(130)

    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")
    # A terminal may lack characters that names have. (The standard error is like that already.)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        commands(prog_name="df11-jax")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # A thread of XLA's may go on compiling, and would crash below it as Python ends.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(INTERRUPTED)
        raise
    except OSError:  # the standard error is full, or nobody reads it: click could not say more
        os._exit(FAILED)


def _interrupt_again(dropped: Any) -> None:
    """Interrupts anew if the first interrupt came where Python drops exceptions.

    JAX has a callback for the collection of garbage, which runs often while modules are imported.
    """
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        # A little later, for it would come here otherwise, and be dropped as well.
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(dropped)
