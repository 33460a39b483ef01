"""The group of all commands of `df11-jax`."""

from typing import Any

import click

from df11_jax.cli import (
    bench,
    compare,
    compress,
    decompress,
    demo,
    doctor,
    fit,
    generate,
    info,
    verify,
)
from df11_jax.cli._errors import failures


class _Commands(click.Group):
    """Lists commands in the order in which one needs them, and ends them all alike."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with failures():  # --help and --version print here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with failures():
            return super().invoke(ctx)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Ends with status 0; 1 if what was compared differs, or what doctor looked at does not "
    "work; 2 if it was used wrongly, or files cannot be read or written; 3 if a model does not "
    "fit; 130 if it was interrupted.",
)
@click.version_option(package_name="df11_jax")
def commands() -> None:
    """Lossless compression of bfloat16 weights in JAX."""


for _command in (
    demo.demo,
    doctor.doctor,
    fit.fit,
    generate.generate,
    info.info,
    compress.compress,
    decompress.decompress,
    verify.verify,
    compare.compare,
    bench.bench,
):
    commands.add_command(_command)
