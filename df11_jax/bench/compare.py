"""`df11-jax compare`: which model, what is measured, in which order."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

import df11_jax
from df11_jax._files.directory import CONFIG, read_json
from df11_jax.bench.comparison import Comparison, Row
from df11_jax.bench.comparison_plot import draw
from df11_jax.bench.device import describe_device, free_bytes, free_host_bytes
from df11_jax.bench.generation import (
    Job,
    Result,
    compile_job,
    decompress_as_a_step,
    run,
)
from df11_jax.bench.plan import find_longest, job_of_length, read_plan
from df11_jax.bench.plotting import check_plot
from df11_jax.bench.programs import Program
from df11_jax.bench.timing import Effort, time_in_turn
from df11_jax.bench.ways import Way, load_ways
from df11_jax.checkpoints import TensorSource, open_checkpoint
from df11_jax.models import Config, Params, RandomSource, read_config
from df11_jax.models.budget import read_budget
from df11_jax.models.estimate import estimate_weights

LLAMA_3_1_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# The same with all sides divided by 8, and fewer layers.
_SMALL = {
    **LLAMA_3_1_8B,
    "vocab_size": 16_032,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
_REPEATS = 3


def run_compare(
    model: Path | None,
    *,
    batches: Sequence[int],
    prompt: int,
    tokens: int,
    memory: int | None,
    as_json: bool,
    plot: str | None,
) -> None:
    """Measures, and prints what it measured.

    Args:
        model: a directory; or a `config.json`, for random weights of its shapes; None for random
            weights of Llama-3.1-8B's shapes on a GPU, of smaller ones on a CPU.
        batches: how many prompts at a time; empty for what suits the device.
        prompt: tokens of each prompt.
        tokens: to choose for each prompt.
        memory: bytes that the device has, of which XLA allocates its share; None for all that is
            free of this one.
        as_json: print JSON, not tables.
        plot: file for a plot; None for none.

    Raises:
        click.ClickException: a plot could not be written.
        OSError, ValueError: the model cannot be read, was not made for so many tokens, or does not
            fit into the host's memory.
        SystemExit: with status 1, after all is printed: tokens or logits differ.
    """
    check_plot(plot)
    name, config, source = _open(model)
    if (needed := prompt + tokens - 1) > config.max_length:
        raise ValueError(
            f"prompts of {prompt} tokens and {tokens} more take {needed} positions, but the model "
            f"was made for {config.max_length}"
        )
    _check_host_memory(name, config)
    budget = free_bytes() if memory is None else read_budget(memory).usable
    click.echo(f"{name} ...", err=True)
    ways = load_ways(source, config, progress=sys.stderr.isatty())
    comparison = Comparison(
        version=df11_jax.__version__,
        jax_version=jax.__version__,
        device=describe_device(),
        model=name,
        layers=config.layers,
        max_length=config.max_length,
        prompt=prompt,
        tokens=tokens,
        budget=budget,
        weights={
            way.name: {
                "device_bytes": way.device_bytes,
                "host_bytes": way.host_bytes,
                "host_layers": way.host_layers,
            }
            for way in ways
        },
    )
    small = jax.default_backend() == "cpu"
    for batch in sorted(batches or ((1, 8) if small else (1, 8, 64, 256))):
        _measure_batch(comparison, ways, config, Job(batch, prompt, tokens))
    if budget is not None:
        for way in ways:
            click.echo(f"longest context, {way.name} ...", err=True)
            try:
                comparison.longest[way.name] = _find_longest(way, config, budget)
            except jax.errors.JaxRuntimeError as error:  # what was measured is not lost
                click.echo(f"not found: {error}", err=True)

    click.echo(json.dumps(comparison.as_json(), indent=1) if as_json else str(comparison))
    if plot is not None:
        draw(comparison).savefig(plot)
    if comparison.differences:
        raise SystemExit(1)


def _open(model: Path | None) -> tuple[str, Config, TensorSource]:
    """What to call the model, its configuration, and its tensors."""
    if model is None:
        small = jax.default_backend() == "cpu"
        config = read_config(_SMALL if small else LLAMA_3_1_8B)
        shape = "Llama-3.1-8B's shapes" + (" / 8, with 8 layers" if small else "")
        return f"random weights of {shape}", config, RandomSource(config)
    file = model / CONFIG if model.is_dir() else model
    config = read_config(read_json(file), str(file))
    if model.is_dir():
        return str(model), config, open_checkpoint(model)
    return f"random weights of the shapes in {model}", config, RandomSource(config)


def _check_host_memory(name: str, config: Config) -> None:
    """Raises ValueError if the weights, compressed and plain, do not fit beside what runs here."""
    free = free_host_bytes()
    weights = estimate_weights(config)
    needed = weights.plain + weights.least
    if free is not None and needed > free:
        raise ValueError(
            f"{name}: the weights, compressed and plain, take {needed / 1e9:.1f} GB of the host's "
            f"memory, and {free / 1e9:.1f} GB are free"
        )


def _measure_batch(comparison: Comparison, ways: Sequence[Way], config: Config, job: Job) -> None:
    """Runs all ways with one batch, and compares what they generate."""
    results: dict[str, Result] = {}
    for way in ways:
        click.echo(f"batch {job.batch}, {way.name} ...", err=True)
        row = Row(way.name, job.batch)
        comparison.rows.append(row)
        try:
            result = _measure(row, way, config, job, comparison.budget)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row.not_run = "out of memory"
            continue
        if result is not None:
            results[way.name] = result
    if not results:
        return
    first, *others = results
    comparison.equal[job.batch] = [first]
    for other in others:
        if kinds := results[other].differences(results[first]):
            comparison.differences.append(
                f"batch {job.batch}: {', '.join(kinds)} of {other} and {first}"
            )
        else:
            comparison.equal[job.batch].append(other)


def _measure(row: Row, way: Way, config: Config, job: Job, budget: int | None) -> Result | None:
    """Fills in a row; returns nothing if it is planned to take more than the budget."""
    device = jax.devices()[0]
    programs = compile_job(way.shapes(device), config, job)
    row.plan = read_plan(programs, way)
    if budget is not None and row.plan.peak > budget:
        row.not_run = "does not fit"
        return None
    before = _device_peak(device)
    params = way.put(device)
    result = run(programs, params, config, job, _REPEATS)
    after = _device_peak(device)
    row.device_peak = after if after > before else None
    row.prefill_seconds, row.decode_seconds = result.prefill_seconds, result.decode_seconds
    if way.name == "compressed":
        row.decompress_seconds = _time_decompression(params, config, job)
    return result


def _time_decompression(params: Params, config: Config, job: Job) -> list[float]:
    tokens = np.random.default_rng(0).integers(0, config.vocab, job.batch).astype(np.int32)
    program = Program(lambda: decompress_as_a_step(params, tokens), calls=1)
    effort = Effort(repeats=_REPEATS, seconds=0.1, warm_up=0.1)
    return time_in_turn({"step": program}, effort)["step"]


def _find_longest(way: Way, config: Config, budget: int) -> int:
    shapes = way.shapes(jax.devices()[0])

    def peak(length: int) -> int:
        return read_plan(compile_job(shapes, config, job_of_length(length)), way).peak

    if way.device_bytes > budget:
        return 0
    return find_longest(peak, budget, config.max_length)


def _device_peak(device: jax.Device) -> int:
    """Bytes in use at most since the process began, 0 if the device does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
