"""The commands of `df11-jax`."""

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="df11_jax")
def commands() -> None:
    """Lossless compression of bfloat16 weights in JAX."""


@commands.command()
def demo() -> None:
    """Generate text from a small model, with plain and with compressed weights, and compare.

    The model (3 million parameters, bundled) writes something like Python's reference manual.
    Exits with an error unless logits and tokens are the same, bit for bit.
    """
    from df11_jax.demo.run import run_demo

    run_demo()
