"""The command line, `df11-jax`: a module for each command, named like it."""

import io
import os
import sys

from df11_jax.cli._require import require


def main() -> None:
    """Runs the command line; says what to install if that is missing."""
    require("cli", "click", "packaging", "rich")
    from df11_jax.cli._commands import commands

    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")
    # A terminal may lack characters that names have. (The standard error is like that already.)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    commands(prog_name="df11-jax")
