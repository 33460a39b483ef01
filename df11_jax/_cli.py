"""The command line, `df11-jax`."""

import sys


def main() -> None:
    """Runs the command line; says what to install if that is missing."""
    try:
        import click  # noqa: F401
        import flax  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        sys.exit(f'df11-jax: {error}. Install it with: pip install "df11_jax[demo]"')
    from df11_jax._commands import commands

    commands(prog_name="df11-jax")
