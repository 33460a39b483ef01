"""Arguments, options and examples that several commands share."""

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from df11_jax._units import parse_bytes
from df11_jax.cli._errors import FAILED, fail

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Path(click.Path):
    """A path, of which an empty one is none: `Path("")` would be the current directory."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        if not os.fspath(value):  # such as "$MODEL" of a variable that is not set
            self.fail("a path must not be empty.", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
COUNT = click.IntRange(1, 2**31 - 1)


class _Temperature(click.FloatRange):
    """A finite number that is not negative."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


TEMPERATURE = _Temperature(min=0)


def examples(*lines: str) -> str:
    """The examples at the end of a command's help; each line follows `df11-jax`."""
    title = "Examples:" if len(lines) > 1 else "Example:"
    # \b keeps click from joining lines.
    return "\n".join(("\b", title, *(f"  df11-jax {line}" for line in lines)))


def prompt_option(**attributes: Any) -> Decorator:
    """`--prompt`, with further attributes of the option."""
    return click.option("--prompt", callback=_not_empty, help="Text to continue.", **attributes)


def devices_option(**attributes: Any) -> Decorator:
    """`--devices`, with further attributes of the option."""
    return click.option(
        "--devices",
        type=COUNT,
        help="Number of devices that the model is divided over.",
        **attributes,
    )


def stages_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--stages`."""
    return click.option(
        "--stages",
        type=COUNT,
        default=1,
        show_default=True,
        help="Number of stages that layers and devices are divided into, such as one a host.",
    )(command)


def memory_option(otherwise: str) -> Decorator:
    """`--memory`, in bytes.

    Args:
        otherwise: the end of the help: what the memory decides, and what is taken without it.
    """
    return click.option(
        "--memory",
        metavar="SIZE",
        callback=_parse_memory,
        help="Memory of a device, of which XLA allocates 75 %: 24GB are 24 x 10^9 bytes, 24GiB "
        "or 24G are 24 x 2^30, which is what cards of 24 GB have, or a little less. " + otherwise,
    )


def published_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--shapes` and `--pattern-dict`: what a published checkpoint without config.json lacks."""
    shapes = click.option(
        "--shapes",
        type=click.Path(exists=True, path_type=Path),
        help="The original model; its headers tell the shapes of a published checkpoint whose own "
        "config.json does not.",
    )
    pattern_dict = click.option(
        "--pattern-dict",
        type=click.Path(exists=True, path_type=Path),
        help="JSON file that tells the units of a published checkpoint: of one to be written, for "
        "model types without a default, or of one that lacks its config.json. The config.json of a "
        "DFloat11 checkpoint is such a file.",
    )
    return shapes(pattern_dict(command))


def _not_empty(context: click.Context, option: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("must not be empty")
    return value


def _parse_memory(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        nbytes = parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if nbytes < 2**20 and value.strip()[-1].isdigit():  # 24 for 24GB
        raise click.BadParameter(f"{value!r} is {nbytes:,} bytes: expected a unit, as in 24GB")
    return nbytes


def _check_plot(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Fails before anything runs if a plot could not be written afterwards."""
    if path is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        fail(FAILED, '--plot needs matplotlib: pip install "df11_jax[plot]"')
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        fail(FAILED, f"--plot: {path}: there is no directory to write it to")
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = os.path.splitext(path)[1].lower()
    known = FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix[1:] not in known:
        fail(FAILED, f"--plot: {path}: expected a file such as plot.png or plot.svg, not {suffix}")
    return path


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
plot_option = click.option(
    "--plot",
    type=_Path(dir_okay=False),
    callback=_check_plot,
    help="Draw a plot to this file.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),  # what jax.random.key tells apart
    default=0,
    show_default=True,
    help="Seed of the random numbers.",
)
