"""The command `df11-jax generate`."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from df11_jax._brief import printable
from df11_jax._progress import ProgressBar, say
from df11_jax._units import format_bytes
from df11_jax.checkpoints import open_checkpoint
from df11_jax.cli._options import (
    COUNT,
    PATH,
    TEMPERATURE,
    devices_option,
    examples,
    prompt_option,
    seed_option,
    stages_option,
)
from df11_jax.cli._output import show_progress
from df11_jax.cli._processes import join_processes, processes_options
from df11_jax.cli._require import require

if TYPE_CHECKING:  # it needs Flax
    from df11_jax.models import Completion, Memory

_EVERY = 4  # tokens between looks at the screen
# Of the characters of a text that a terminal obeys: those of right-to-left text are its own.
_KEPT = "\n\t\u2066\u2067\u2068\u2069"


def _hub_directory(context: click.Context, argument: click.Parameter, path: Path) -> Path:
    # What looks like a name on the hub is probably meant as one.
    if not path.exists():
        raise click.BadParameter(
            f"{path}: does not exist. Nothing is downloaded: get a model from the Hugging Face "
            "hub with `hf download OWNER/NAME --local-dir DIRECTORY`, and give the directory"
        )
    return path


@click.command(
    short_help="Text from a Hugging Face model directory.",
    epilog=examples(
        'generate Llama-3.2-1B --prompt "The first thing to know"',
        'generate Qwen3-8B-df11 --prompt "Once" --temperature 0.7 --top-p 0.9 --tokens 500',
        'generate Llama-3.1-70B --prompt "Once" --devices 2',
    ),
)
@click.argument("model", type=PATH, callback=_hub_directory)
@prompt_option(required=True)
@click.option(
    "--tokens", type=COUNT, default=100, show_default=True, help="Tokens to generate, at most."
)
@click.option(
    "--temperature",
    type=TEMPERATURE,
    default=0.0,
    show_default=True,
    help="0 takes the likeliest tokens.",
)
@click.option("--top-k", type=COUNT, help="Draw from the k likeliest tokens only.")
@click.option(
    "--top-p", type=float, help="Draw from the likeliest that together have this probability."
)
@seed_option
@click.option("--plain", is_flag=True, help="Do not compress the weights.")
@click.option(
    "--exact",
    is_flag=True,
    help="Decompress before multiplying, for the bits of plain weights on GPUs that can fuse both.",
)
@click.option("--cast", is_flag=True, help="Round float32 and float16 weights to bfloat16.")
@devices_option(show_default="1, or all of several processes")
@stages_option
@processes_options
def generate(
    model: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    plain: bool,
    exact: bool,
    cast: bool,
    devices: int | None,
    stages: int,
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
) -> None:
    """Generate text from the Hugging Face directory MODEL, with compressed weights.

    For Llama, Qwen, Mistral, Phi, GLM, Gemma 3 and their like. The text goes to the standard
    output; what it took in time and memory, to the standard error. If several processes run this
    together, the model is divided over the devices of all of them, and the first one prints.
    """
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise click.UsageError("--top-k and --top-p say what to draw from: give a --temperature")
    require("models", "flax", "tokenizers")
    prints = join_processes(coordinator, process_id, num_processes)
    from df11_jax import models
    from df11_jax.models.prompts import check_prompts, encode

    source = open_checkpoint(model)
    config, tokenizer, stop = models.read_directory(source)
    config = dataclasses.replace(config, exact=exact)
    # Before the weights are read, which takes a while.
    (ids,) = encode(tokenizer, [prompt])
    check_prompts([ids], config, tokens)
    sampling = models.Sampling(temperature, top_k, top_p).checked()
    params = models.load_params(
        source,
        config,
        compress=not plain,
        cast=cast,
        progress=prints and show_progress(),
        devices=devices,
        stages=stages,
    )
    # In advance, so that it is not timed.
    programs = models.compile_programs(
        params,
        config,
        batch=1,
        prompt=len(ids),
        tokens=tokens,
        sampling=sampling,
        stops=len(set(stop)),
        every=_EVERY,
    )
    click.echo(click.style(_shown(prompt), bold=True), nl=False)
    times = [time.perf_counter()]

    def show(new: list[str]) -> None:
        times.append(time.perf_counter())
        click.echo(_shown(new[0]), nl=False)
        left = max(0, tokens - (len(times) - 2) * _EVERY)
        bar.update("the text", min(_EVERY, left))

    # On a terminal, the text shows that something happens.
    is_wanted = prints and show_progress() and not sys.stdout.isatty()
    with ProgressBar("generate", tokens, unit="tokens", show=is_wanted) as bar:
        (completion,) = models.TextModel(params, config, tokenizer, stop).generate(
            [prompt], tokens=tokens, sampling=sampling, seed=seed, every=_EVERY, callback=show
        )
    times.append(time.perf_counter())
    click.echo()
    mesh, memory = models.find_mesh(params), models.measure_memory(params, programs)
    if not prints:
        return
    say("\n" + _describe_speed(completion, times))
    if not plain:
        say(_describe_products(programs.fused))
    say(_describe_memory(memory, plain, mesh.size if mesh else 1))


def _shown(text: str) -> str:
    """A text as a terminal shows it; anything else gets it as it is."""
    return printable(text, keep=_KEPT) if sys.stdout.isatty() else text


def _describe_speed(completion: "Completion", times: list[float]) -> str:
    count = len(completion.tokens)
    speed = f", then {(count - 1) / (times[-1] - times[1]):.2f} a second" if count > 1 else ""
    return f"{count} tokens, the first after {times[1] - times[0]:.2f} s{speed}"


def _describe_products(fused: bool) -> str:
    if fused:
        return "products fused with decompression; --exact gives the bits of plain weights"
    return "products after decompression, with the bits of plain weights"


def _describe_memory(memory: "Memory", plain: bool, devices: int) -> str:
    where = f"on each of {devices} devices: " if devices > 1 else ""
    before = "" if plain else f" (plain: {format_bytes(memory.plain_weights)})"
    return (
        f"{where}weights {format_bytes(memory.weights)}{before}, cache "
        f"{format_bytes(memory.cache)}, temporary "
        f"{format_bytes(max(memory.prefill, memory.decode))}"
    )
