"""The commands of `df11-jax`."""

from pathlib import Path

import click

from df11_jax._units import parse_bytes
from df11_jax.cli import _checkpoint_commands
from df11_jax.cli._errors import failures
from df11_jax.cli._main import require

_SEED = click.IntRange(0, 2**32 - 1)  # what jax.random.key tells apart

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_plot = click.option("--plot", type=click.Path(dir_okay=False), help="Draw a plot to this file.")


class _InOrder(click.Group):
    """Lists commands in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _examples(*lines: str) -> str:
    # \b keeps click from joining lines.
    return "\n".join(("\b", "Examples:", *(f"  df11-jax {line}" for line in lines)))


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


def _hub_directory(context: click.Context, argument: click.Parameter, path: Path) -> Path:
    # What looks like a name on the hub is probably meant as one.
    if not path.is_dir():
        raise click.BadParameter(
            f"{path}: is no directory. Nothing is downloaded: get a model from the Hugging Face "
            "hub with `hf download OWNER/NAME --local-dir DIRECTORY`, and give the directory"
        )
    return path


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Ends with status 0; 1 if what was compared differs, or what doctor looked at does not "
    "work; 2 if it was used wrongly, or files cannot be read or written; 3 if a model does not "
    "fit; 130 if it was interrupted.",
)
@click.version_option(package_name="df11_jax")
def commands() -> None:
    """Lossless compression of bfloat16 weights in JAX."""


@commands.command(
    short_help="A small model, plain and compressed, compared.",
    epilog=_examples("demo", 'demo --prompt "A class definition " --tokens 100'),
)
@click.option(
    "--prompt",
    callback=_not_empty,
    default='The "with" statement ',
    show_default=True,
    help="Text to continue.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Bytes to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Temperature of the text that is shown; 0 takes the likeliest bytes.",
)
@click.option(
    "--seed", type=_SEED, default=0, show_default=True, help="Seed of the random numbers for it."
)
def demo(prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Generate text from a small model, with plain and with compressed weights, and compare.

    The bundled model (3 million parameters) writes something like Python's reference manual.
    Exits with an error unless logits and tokens are the same, bit for bit.
    """
    require("demo", "flax")
    from df11_jax.demo.run import run_demo

    run_demo(prompt, tokens, temperature, seed)


@commands.command(
    short_help="What this machine can do, and what is missing.",
    epilog=_examples("doctor", "doctor --json"),
)
@_json
def doctor(as_json: bool) -> None:
    """Show what this machine can do, and what to do about what it cannot.

    Versions, the devices of every backend of JAX, which decoder is used on each and why, whether
    the CUDA library is there and loads, optional packages, and a self-test of every decoder: all
    65,536 bit patterns, and weights from a normal distribution. A missing GPU is no error.
    """
    from df11_jax.doctor.run import run_doctor

    if not run_doctor(as_json=as_json):
        raise click.exceptions.Exit(1)


@commands.command(
    short_help="Whether a model fits, plain and compressed.",
    epilog=_examples(
        "fit Llama-3.1-8B --memory 24GiB",
        "fit Llama-3.1-70B/config.json --memory 80GB --devices 2 --context 32768",
        "fit Qwen3-8B-DF11 --memory 16GiB --batch 4 --json",
    ),
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--memory",
    metavar="SIZE",
    callback=_parse_memory,
    help="Memory of each device, of which XLA allocates 75 %: 24GB are 24 x 10^9 bytes, 24GiB or "
    "24G are 24 x 2^30, which is what cards of 24 GB have, or a little less. Without it, the "
    "memory of the GPU that is here.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of each sequence, read and generated. [default: 8192, or what the model allows]",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Number of sequences."
)
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of devices that the model is divided over; all figures are of one of them.",
)
@_json
def fit(
    model: Path, memory: int | None, context: int | None, batch: int, devices: int, as_json: bool
) -> None:
    """Say whether a model fits in memory, plain and compressed, without its weights or a GPU.

    MODEL is a directory as Hugging Face lays it out, with weights or without, or its config.json;
    or a checkpoint in any format. Only headers are read. Of models that `df11-jax generate` cannot
    run, only the weights are counted.

    Ends with status 0 if the model fits compressed, with 3 if it does not, and with 2 if that
    cannot be said. XLA_CLIENT_MEM_FRACTION changes the 75 % of the memory, for this command
    as for JAX.
    """
    require("flax", "flax")
    from df11_jax.cli.fit import run_fit

    with failures():
        run_fit(
            model, memory=memory, context=context, batch=batch, devices=devices, as_json=as_json
        )


@commands.command(
    short_help="Text from a Hugging Face model directory.",
    epilog=_examples(
        'generate Llama-3.2-1B --prompt "The first thing to know"',
        'generate Qwen3-8B-df11 --prompt "Once" --temperature 0.7 --top-p 0.9 --tokens 500',
        'generate Llama-3.1-70B --prompt "Once" --devices 2',
    ),
)
@click.argument("model", type=click.Path(path_type=Path), callback=_hub_directory)
@click.option("--prompt", callback=_not_empty, required=True, help="Text to continue.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Tokens to generate, at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest tokens.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the k likeliest tokens only.")
@click.option(
    "--top-p", type=float, help="Draw from the likeliest that together have this probability."
)
@click.option(
    "--seed", type=_SEED, default=0, show_default=True, help="Seed of the random numbers."
)
@click.option("--plain", is_flag=True, help="Do not compress the weights.")
@click.option("--cast", is_flag=True, help="Round float32 and float16 weights to bfloat16.")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of devices to divide the model over.",
)
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
    devices: int,
) -> None:
    """Generate text from the Hugging Face directory MODEL, with compressed weights.

    For Llama 3, Qwen 2.5, Qwen 3 and Gemma 3. The text goes to the standard output; what it took
    in time and memory, to the standard error.
    """
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise click.UsageError("--top-k and --top-p say what to draw from: give a --temperature")
    require("models", "flax", "tokenizers")
    from df11_jax.cli.generate import run_generate
    from df11_jax.models import Sampling

    with failures():
        run_generate(
            model,
            prompt,
            tokens=tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            plain=plain,
            cast=cast,
            devices=devices,
        )


for _command in (
    _checkpoint_commands.info,
    _checkpoint_commands.compress,
    _checkpoint_commands.decompress,
    _checkpoint_commands.verify,
):
    commands.add_command(_command)


@commands.command(
    short_help="Plain, compressed and offloaded weights, compared.",
    epilog=_examples(
        "compare",
        "compare Llama-3.1-8B/config.json --memory 24GiB --plot compare.png",
        "compare Qwen3-8B --batch 1 --batch 16 --json",
    ),
)
@click.argument("model", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="Number of prompts at a time; may be given several times. [default: 1, 8, 64, 256; on a "
    "CPU 1, 8]",
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
    "--tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens to generate after each prompt.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=_parse_memory,
    help="Memory of the device, of which XLA allocates 75 %, as for `df11-jax fit`: nothing that "
    "takes more is run. [default: what is free of this one]",
)
@_json
@_plot
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
    shapes. Without it, weights are random: of Llama-3.1-8B's shapes on a GPU, of a small model's on
    a CPU.

    Reports tokens a second, memory of the device, and the longest context that fits into it. Ends
    with status 1 unless tokens and logits of all are the same, bit for bit.
    """
    require("models", "flax")
    from df11_jax.bench.compare import run_compare

    with failures():
        run_compare(
            model,
            batches=batches,
            prompt=prompt,
            tokens=tokens,
            memory=memory,
            as_json=as_json,
            plot=plot,
        )


@commands.command(
    short_help="How fast this device decompresses.",
    epilog=_examples("bench --quick", "bench --json --plot bench.png"),
)
@click.option("--quick", is_flag=True, help="Fewer sizes, in less time.")
@click.option(
    "--max-weights", type=click.IntRange(min=2**16), help="Most weights of a tensor or a block."
)
@_json
@_plot
def bench(quick: bool, max_weights: int | None, as_json: bool, plot: str | None) -> None:
    """Measure how fast this device decompresses, and what its memory would allow.

    Over tensors of 1 M to 1 G weights and the transformer blocks of four models, as far as memory
    allows (up to 64 M weights on a CPU), with other decoders beside it where they are installed.
    """
    from df11_jax.bench.run import run_bench

    run_bench(quick=quick, max_weights=max_weights, as_json=as_json, plot=plot)
