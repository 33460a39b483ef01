"""The command line, `df11-jax`."""

import importlib.util
import sys


def main() -> None:
    """Runs the command line; says what to install if that is missing."""
    require("cli", "click", "rich")
    from df11_jax.cli._commands import commands

    commands(prog_name="df11-jax")


def require(extra: str, *modules: str) -> None:
    """Ends the program if modules are missing, and says what to install."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        message = f'df11-jax needs {names}. Install with: pip install "df11_jax[{extra}]"'
        print(message, file=sys.stderr)
        sys.exit(2)
