"""The command `df11-jax generate`."""

import sys
import time
from pathlib import Path

import click

from df11_jax import models
from df11_jax._units import format_bytes
from df11_jax.checkpoints import open_checkpoint
from df11_jax.models.prompts import check_prompts, encode

_EVERY = 4  # tokens between looks at the screen


def run_generate(
    path: Path,
    prompt: str,
    *,
    tokens: int,
    sampling: models.Sampling,
    seed: int,
    plain: bool,
    cast: bool,
    devices: int,
) -> None:
    """Continues a text on the standard output, and tells on the standard error what it took.

    Args:
        path: of the model's directory.
        prompt: the text.
        tokens: how many to generate, at most.
        sampling: how to choose them.
        seed: for sampling.
        plain: do not compress the weights.
        cast: round float32 and float16 weights.
        devices: how many to divide the model over.

    Raises:
        OSError, ValueError: as `load` and `TextModel.generate`.
    """
    config, tokenizer, stop = models.read_directory(path)
    # Before the weights are read, which takes a while.
    (ids,) = encode(tokenizer, [prompt])
    check_prompts([ids], config, tokens)
    sampling = sampling.checked()
    params = models.load_params(
        open_checkpoint(path),
        config,
        compress=not plain,
        cast=cast,
        progress=sys.stderr.isatty(),
        devices=devices,
    )
    model = models.TextModel(params, config, tokenizer, stop)
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
    memory = models.measure_memory(params, programs)
    click.echo(click.style(prompt, bold=True), nl=False)
    times = [time.perf_counter()]

    def show(new: list[str]) -> None:
        times.append(time.perf_counter())
        click.echo(new[0], nl=False)

    (completion,) = model.generate(
        [prompt], tokens=tokens, sampling=sampling, seed=seed, every=_EVERY, callback=show
    )
    times.append(time.perf_counter())
    click.echo()
    count = len(completion.tokens)
    speed = f", then {(count - 1) / (times[-1] - times[1]):.2f} a second" if count > 1 else ""
    before = "" if plain else f" (plain: {format_bytes(memory.plain_weights)})"
    where = f"on each of {devices} devices: " if devices > 1 else ""
    temporary = format_bytes(max(memory.prefill, memory.decode))
    for line in (
        f"\n{count} tokens, the first after {times[1] - times[0]:.2f} s{speed}",
        f"{where}weights {format_bytes(memory.weights)}{before}, "
        f"cache {format_bytes(memory.cache)}, temporary {temporary}",
    ):
        click.echo(line, err=True)
