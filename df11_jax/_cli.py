"""The command line, `df11-jax`."""

import importlib.util
import sys


def main() -> None:
    """Runs the command line; says what to install if that is missing."""
    needed = ("click", "flax", "rich", "safetensors")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'df11-jax needs {", ".join(missing)}. Install with: pip install "df11_jax[demo]"')
    from df11_jax._commands import commands

    commands(prog_name="df11-jax")
