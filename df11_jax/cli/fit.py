"""The command `df11-jax fit`."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from df11_jax._units import format_bytes
from df11_jax.cli._errors import DOES_NOT_FIT
from df11_jax.cli._options import (
    COUNT,
    PATH,
    devices_option,
    examples,
    json_option,
    memory_option,
    stages_option,
)
from df11_jax.cli._output import make_table, open_console, print_json
from df11_jax.cli._require import require

if TYPE_CHECKING:  # it needs Flax
    from df11_jax.models.fit import Fit


@click.command(
    short_help="Whether a model fits, plain and compressed.",
    epilog=examples(
        "fit Llama-3.1-8B --memory 24GiB",
        "fit Llama-3.1-70B/config.json --memory 80GB --devices 2 --context 32768",
        "fit Qwen3-8B-DF11 --memory 16GiB --batch 4 --json",
    ),
)
@click.argument("model", type=PATH)
@memory_option("[default: the memory of the GPU that is here]")
@click.option(
    "--context",
    type=COUNT,
    help="Tokens of each sequence, read and generated. [default: 8192, or what the model allows]",
)
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Number of sequences.")
@devices_option(default=1, show_default=True)
@stages_option
@json_option
def fit(
    model: Path,
    memory: int | None,
    context: int | None,
    batch: int,
    devices: int,
    stages: int,
    as_json: bool,
) -> None:
    """Say whether a model fits in memory, plain and compressed, without its weights or a GPU.

    MODEL is a directory as Hugging Face lays it out, with weights or without, or its config.json;
    or a checkpoint in any format. Only headers are read. Of models that `df11-jax generate` cannot
    run, only the weights are counted. With several devices, all figures are of one of them.

    Ends with status 0 if the model fits compressed, with 3 if it does not, and with 2 if that
    cannot be said. XLA_CLIENT_MEM_FRACTION changes the 75 % of the memory, for this command
    as for JAX.
    """
    require("flax", "flax")
    from df11_jax.models.budget import read_budget
    from df11_jax.models.fit import fit as fit_model
    from df11_jax.models.fit import read_model

    weights = read_model(model)
    budget = read_budget(memory)
    answer = fit_model(
        weights, budget, batch=batch, context=context, devices=devices, stages=stages
    )
    if as_json:
        print_json(answer.as_json())
    else:
        _print(answer)
    if not answer.compressed.fits:
        sys.exit(DOES_NOT_FIT)


def _print(answer: "Fit") -> None:
    console = open_console()
    model = answer.model
    family = f"{model.config.family}, " if model.config else ""
    console.print(f"{model.path}: {family}{model.parameters:,} parameters", soft_wrap=True)
    console.print(_table(answer))
    for line in _verdicts(answer):
        console.print(line, soft_wrap=True)
    for note in _notes(answer):
        console.print(f"- {note}", soft_wrap=True, style="dim")


def _notes(answer: "Fit") -> list[str]:
    from df11_jax.models.budget import DEFAULT_FRACTION, FRACTION_VARIABLES

    model, budget = answer.model, answer.budget
    source = "by its environment" if budget.fraction != DEFAULT_FRACTION else "by default"
    notes = [
        f"XLA allocates {format_bytes(budget.usable)}, {budget.fraction:.0%} of the "
        f"{format_bytes(budget.memory)} of {budget.device or 'a device'} ({source}; "
        f"{FRACTION_VARIABLES[0]} changes it). The rest is left to CUDA and other programs.",
        _weights_note(answer),
    ]
    if model.wide:
        types = " and ".join(model.wide)
        notes.append(
            f"The model is {types}. All figures are those of weights rounded to bfloat16, as "
            "`df11-jax generate --cast` and `compress --cast` round them."
            if model.is_rounded
            else f"Weights that are {types} count as they are, not compressed; `df11-jax compress "
            "--cast` rounds them to bfloat16."
        )
    if model.config:
        notes.append(
            "Temporary memory is estimated from what XLA plans for an H100; the totals came out up "
            "to 3 % too high with compressed weights, and 5 % with plain ones, which are taken "
            "to need as much."
        )
    else:
        notes.append(
            f"Only weights are known, and nothing of cache and activations: {model.reason}"
        )
    if answer.devices > 1:
        divided = (
            "divided within its layers, as `df11-jax generate --devices` does it"
            if model.config
            else "divided evenly"
        )
        stages = f" in {answer.stages} stages" if answer.stages > 1 else ""
        notes.append(f"For each of {answer.devices} devices{stages}, with the model {divided}.")
    return notes


def _table(answer: "Fit") -> Table:
    plain, small, parts = answer.plain, answer.compressed, answer.temporary
    head = "" if answer.devices == 1 else "of each device"
    table = make_table(head, "plain", "compressed", right=("plain", "compressed"))

    def add(name: str, *nbytes: float) -> None:
        table.add_row(name, *map(format_bytes, nbytes))

    approximately = "" if answer.model.weights.exact else "about "
    table.add_row(
        "weights", format_bytes(plain.weights), approximately + format_bytes(small.weights)
    )
    if parts is not None:
        name = f"cache of {answer.context:,} tokens"
        add(name + (f" x {answer.batch:,}" if answer.batch > 1 else ""), plain.cache, small.cache)
        # At the peak there is either a block or a piece of the head.
        if parts.block:
            add("temporary: one block", parts.block, parts.block)
            add("  copies of the cache", parts.cache_copy, parts.cache_copy)
        else:
            add("temporary: a piece of the head", parts.head, parts.head)
        add("  activations", parts.activations, parts.activations)
    table.add_section()
    add("total", plain.total, small.total)
    add("XLA allocates", answer.budget.usable, answer.budget.usable)
    table.add_row("left", *(_signed_bytes(need.free) for need in (plain, small)))
    if parts is not None:
        table.add_section()
        longest = (_number(need.longest_context) for need in (plain, small))
        table.add_row(f"longest context, batch {answer.batch:,}", *longest)
        largest = (_number(need.largest_batch) for need in (plain, small))
        table.add_row(f"largest batch, {answer.context:,} tokens", *largest)
    return table


def _verdicts(answer: "Fit") -> list[str]:
    from df11_jax.models.budget import FRACTION_VARIABLES, MOST_FRACTION

    lines, alone = [], "" if answer.model.config else ", weights alone"
    for name, need in (("plain", answer.plain), ("compressed", answer.compressed)):
        line = f"{name}{alone}: {'fits' if need.fits else 'does not fit'}"
        # Rounded up.
        fraction = math.ceil(100 * need.fraction_needed) / 100
        if need.fits and not need.fits_at_most:
            line += ", but not if weights take the most that they may"
        elif not need.fits and fraction <= MOST_FRACTION:
            line += f"; it does with {FRACTION_VARIABLES[0]}={fraction:.2f}"
        lines.append(line)
    return lines


def _weights_note(answer: "Fit") -> str:
    model, need = answer.model, answer.compressed
    if model.weights.exact:
        note = f"Weights are as the {model.format} checkpoint has them, by its headers."
        if model.format == "published":
            note += " Loaded, they become native, which is about 2 % smaller."
        return note
    expected, least, most = (f"{8 * n / model.parameters:.1f}" for n in model.weights[1:])
    return (
        f"Compressed weights are estimated, at {expected} bits each; {least} to {most} "
        f"({format_bytes(need.weights_least)} to {format_bytes(need.weights_most)}) is usual."
    )


def _signed_bytes(nbytes: int) -> str:
    return f"-{format_bytes(-nbytes)}" if nbytes < 0 else format_bytes(nbytes)


def _number(value: int | None) -> str:
    return f"{value:,}" if value else "none"
