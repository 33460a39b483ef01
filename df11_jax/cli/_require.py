"""The check that an extra of df11_jax is installed; click itself may be missing."""

import importlib.util
import sys


def require(extra: str, *modules: str) -> None:
    """Ends the program if modules are missing, and says what to install."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        message = f'df11-jax needs {names}. Install with: pip install "df11_jax[{extra}]"'
        print(message, file=sys.stderr)
        sys.exit(2)
