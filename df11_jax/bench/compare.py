"""The measurements of `df11-jax compare`, and their order."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import df11_jax
from df11_jax._files.directory import read_json
from df11_jax._files.folder import CONFIG
from df11_jax._progress import say
from df11_jax.bench.device import describe_device, free_bytes, free_host_bytes
from df11_jax.bench.generation_figures import GenerationFigures, Row
from df11_jax.bench.placements import PlacedWeights, load_placements
from df11_jax.bench.plan import find_longest, read_plan, request_of_length
from df11_jax.bench.programs import Program
from df11_jax.bench.request import Request, Result, compile_request, decompress_as_a_step, run
from df11_jax.bench.timing import Effort, time_in_turn
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
    progress: bool,
) -> GenerationFigures:
    """Measures a model with its weights in each placement.

    Tells on the standard error what it measures.

    Args:
        model: a directory; or a `config.json`, for random weights of its shapes; None for random
            weights of Llama-3.1-8B's shapes on a GPU, of smaller ones on a CPU.
        batches: the numbers of prompts at a time; empty for what suits the device.
        prompt: the number of tokens of each prompt.
        tokens: the number of tokens to choose for each prompt.
        memory: the bytes that the device has, of which XLA allocates its share; None for all that
            is free of this one.
        progress: True for a progress bar while the weights are compressed.

    Returns:
        The figures. Their differences say where tokens or logits differ.

    Raises:
        OSError: the model cannot be read.
        ValueError: the model cannot be read, was not made for so many tokens, or does not fit into
            the host's memory.
    """
    name, config, source = _open(model)
    if (needed := prompt + tokens - 1) > config.max_length:
        raise ValueError(
            f"prompts of {prompt} tokens and {tokens} more take {needed} positions, but the model "
            f"was made for {config.max_length}"
        )
    # Tokens and logits of all placements are compared, bit by bit.
    config = dataclasses.replace(config, exact=True)
    _check_host_memory(name, config)
    budget = free_bytes() if memory is None else read_budget(memory).usable
    say(f"{name} ...")
    placements = load_placements(source, config, progress=progress)
    figures = GenerationFigures(
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
            weights.name: {
                "device_bytes": weights.device_bytes,
                "host_bytes": weights.host_bytes,
                "host_layers": weights.host_layers,
            }
            for weights in placements
        },
    )
    small = jax.default_backend() == "cpu"
    for batch in sorted(batches or ((1, 8) if small else (1, 8, 64, 256))):
        _measure_batch(figures, placements, config, Request(batch, prompt, tokens))
    if budget is not None:
        for weights in placements:
            say(f"longest context, {weights.name} ...")
            try:
                figures.longest[weights.name] = _find_longest(weights, config, budget)
            except jax.errors.JaxRuntimeError as error:  # what was measured is not lost
                say(f"not found: {error}")
    return figures


def _open(model: Path | None) -> tuple[str, Config, TensorSource]:
    """The name of the model, its configuration, and its tensors."""
    if model is None:
        small = jax.default_backend() == "cpu"
        config = read_config(_SMALL if small else LLAMA_3_1_8B)
        shape = "Llama-3.1-8B's shapes" + (" / 8, with 8 layers" if small else "")
        return f"random weights of {shape}", config, RandomSource(config)
    if model.is_dir():
        source = open_checkpoint(model)
        return str(model), read_config(source.model_config(), str(model / CONFIG)), source
    config = read_config(read_json(model), str(model))
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


def _measure_batch(
    figures: GenerationFigures,
    placements: Sequence[PlacedWeights],
    config: Config,
    request: Request,
) -> None:
    """Measures all placements with one batch, and compares what they generate."""
    results: dict[str, Result] = {}
    for weights in placements:
        say(f"batch {request.batch}, {weights.name} ...")
        row = Row(weights.name, request.batch)
        figures.rows.append(row)
        try:
            result = _measure(row, weights, config, request, figures.budget)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row.not_run = "out of memory"
            continue
        if result is not None:
            results[weights.name] = result
    if not results:
        return
    first, *others = results
    figures.equal[request.batch] = [first]
    for other in others:
        if kinds := results[other].differences(results[first]):
            figures.differences.append(
                f"batch {request.batch}: {', '.join(kinds)} of {other} and {first}"
            )
        else:
            figures.equal[request.batch].append(other)


def _measure(
    row: Row, weights: PlacedWeights, config: Config, request: Request, budget: int | None
) -> Result | None:
    """Fills in a row; returns None if it is planned to take more than the budget."""
    device = jax.devices()[0]
    programs = compile_request(weights.shapes(device), config, request)
    row.plan = read_plan(programs, weights)
    if budget is not None and row.plan.peak > budget:
        row.not_run = "does not fit"
        return None
    before = _device_peak(device)
    params = weights.put(device)
    result = run(programs, params, config, request, _REPEATS)
    after = _device_peak(device)
    row.device_peak = after if after > before else None
    row.prefill_seconds, row.decode_seconds = result.prefill_seconds, result.decode_seconds
    if weights.name == "compressed":
        row.decompress_seconds = _time_decompression(params, config, request.batch)
    return result


def _time_decompression(params: Params, config: Config, batch: int) -> list[float]:
    tokens = np.random.default_rng(0).integers(0, config.vocab, batch).astype(np.int32)
    program = Program(lambda: decompress_as_a_step(params, tokens), calls=1)
    effort = Effort(repeats=_REPEATS, seconds=0.1, warm_up=0.1)
    return time_in_turn({"step": program}, effort)["step"]


def _find_longest(weights: PlacedWeights, config: Config, budget: int) -> int:
    shapes = weights.shapes(jax.devices()[0])

    def peak(length: int) -> int:
        return read_plan(compile_request(shapes, config, request_of_length(length)), weights).peak

    if weights.device_bytes > budget:
        return 0
    return find_longest(peak, budget, config.max_length)


def _device_peak(device: jax.Device) -> int:
    """The most bytes in use since the process began; 0 if the device does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
