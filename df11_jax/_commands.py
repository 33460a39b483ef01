"""The commands of `df11-jax`."""

import re
from pathlib import Path

import click

from df11_jax import _checkpoint_commands
from df11_jax._cli import require


def _not_empty(context: click.Context, option: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("must not be empty")
    return value


def _bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(M|G)(i?)B", value)
    if not match or not float(match[1]):
        raise click.BadParameter(f"{value!r} is not a size such as 24GB, 80GiB or 500MB")
    return round(float(match[1]) * (1024 if match[3] else 1000) ** {"M": 2, "G": 3}[match[2]])


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Ends with status 0; 1 if what was compared differs; 2 if it was used wrongly, or files "
    "cannot be read or written; 130 if it was interrupted.",
)
@click.version_option(package_name="df11_jax")
def commands() -> None:
    """Lossless compression of bfloat16 weights in JAX."""


commands.add_command(_checkpoint_commands.info)
commands.add_command(_checkpoint_commands.compress)
commands.add_command(_checkpoint_commands.decompress)
commands.add_command(_checkpoint_commands.verify)


@commands.command()
@click.option(
    "--prompt",
    callback=_not_empty,
    default='The "with" statement ',
    show_default=True,
    help="To continue.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Bytes to generate.",
)
@click.option("--temperature", default=0.5, show_default=True, help="Of the text that is shown.")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers for it.")
def demo(prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Generate text from a small model, with plain and with compressed weights, and compare.

    The bundled model (3 million parameters) writes something like Python's reference manual.
    Exits with an error unless logits and tokens are the same, bit for bit.
    """
    require("demo", "flax")
    from df11_jax.demo.run import run_demo

    run_demo(prompt, tokens, temperature, seed)


@commands.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt", callback=_not_empty, required=True, help="To continue.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=100, show_default=True, help="To generate."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest.")
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the likeliest that have this probability.")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers.")
@click.option("--plain", is_flag=True, help="Do not compress the weights.")
@click.option("--cast", is_flag=True, help="Round float32 and float16 weights to bfloat16.")
def generate(
    model: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    plain: bool,
    cast: bool,
) -> None:
    """Generate text from the Hugging Face directory MODEL, with compressed weights.

    For Llama 3, Qwen 2.5, Qwen 3 and Gemma 3. The text goes to the standard output; what it took
    in time and memory, to the standard error.
    """
    require("models", "flax", "tokenizers")
    from df11_jax.models import Sampling
    from df11_jax.models._command import run_generate

    with _checkpoint_commands._failures():
        run_generate(
            model,
            prompt,
            tokens=tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            plain=plain,
            cast=cast,
        )


@commands.command()
@click.option("--quick", is_flag=True, help="Fewer sizes, in less time.")
@click.option("--max-weights", type=click.IntRange(min=2**16), help="Of a tensor or a block.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=click.Path(dir_okay=False), help="File for a plot (matplotlib).")
def bench(quick: bool, max_weights: int | None, as_json: bool, plot: str | None) -> None:
    """Measure how fast this device decompresses, and what its memory would allow.

    Over tensors of 1 M to 1 G weights and the transformer blocks of four models, as far as memory
    allows (up to 64 M weights on a CPU), with other decoders beside it where they are installed.
    """
    from df11_jax.bench.run import run_bench

    run_bench(quick=quick, max_weights=max_weights, as_json=as_json, plot=plot)


@commands.command()
@click.argument("model", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="Prompts at a time; may be given several times.  [1, 8, 64, 256; on a CPU 1, 8]",
)
@click.option(
    "--prompt-length",
    "prompt",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of each prompt.",
)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=32, show_default=True, help="To generate."
)
@click.option(
    "--memory",
    callback=_bytes,
    help="Device memory that may be used, such as 24GB (10^9 bytes each) or 80GiB.  [all there is]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=click.Path(dir_okay=False), help="File for a plot (matplotlib).")
def compare(
    model: Path | None,
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    memory: int | None,
    as_json: bool,
    plot: str | None,
) -> None:
    """Compare compressed weights with plain ones, and with plain ones partly in host memory.

    MODEL is a directory as Hugging Face lays it out, or a config.json, for random weights of its
    shapes. Without it, weights are random, and shaped like Llama-3.1-8B's on a GPU.

    Reports tokens a second, memory of the device, and the longest context that fits into it. Ends
    with status 1 unless tokens and logits of all are the same, bit for bit.
    """
    require("models", "flax")
    from df11_jax.bench.compare import run_compare

    with _checkpoint_commands._failures():
        run_compare(
            model,
            batches=batches,
            prompt=prompt,
            tokens=tokens,
            memory=memory,
            as_json=as_json,
            plot=plot,
        )
