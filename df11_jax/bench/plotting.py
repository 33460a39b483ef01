"""Files for plots: what would keep them from being written is found out before anything runs."""

import importlib.util
import os

from df11_jax.cli._errors import FAILED, fail


def check_plot(path: str | None) -> None:
    """Checks that a plot can be written.

    Args:
        path: of its file; None for no plot.

    Raises:
        click.ClickException: matplotlib or the directory is missing, or matplotlib does not write
            such files.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        fail('--plot needs matplotlib: pip install "df11_jax[plot]"', FAILED)
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        fail(f"--plot: {path}: there is no directory to write it to", FAILED)
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = os.path.splitext(path)[1].lower()
    known = FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix[1:] not in known:
        fail(f"--plot: {path}: expected a file such as plot.png or plot.svg, not {suffix}", FAILED)
