"""One way of `df11-jax compare`: all weights, under the XLA flags of this process.

`python -m df11_jax.bench.one_way TASK`, where TASK is a `Task` as JSON. XLA reads its flags once a
process, so each way has one. It prints events as lines of JSON, each as soon as there is one, and
ends when its standard input does: it does not outlive who started it.
"""

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import df11_jax
from df11_jax._array import is_df11
from df11_jax._host_arrays import start_backends
from df11_jax._product import is_fused_in
from df11_jax._progress import say
from df11_jax.bench.compared_model import open_model
from df11_jax.bench.device import describe_device, free_bytes
from df11_jax.bench.placements import PlacedWeights, load_placements
from df11_jax.bench.plan import find_longest, read_plan, request_of_length
from df11_jax.bench.programs import Program
from df11_jax.bench.request import (
    Request,
    RequestPrograms,
    compile_request,
    decompress_as_a_step,
    run,
)
from df11_jax.bench.timing import Effort, time_in_turn
from df11_jax.models import Config, Params
from df11_jax.models.budget import read_budget

# Of each request; fewer where they take long, as with weights in host memory.
_REPEATS, _MOST_SECONDS = 3, 4.0

Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        model: see `open_model`.
        batches: the numbers of prompts at a time; empty for what suits the device.
        prompt: the number of tokens of each prompt.
        tokens: the number of tokens to choose for each prompt.
        memory: the bytes that the device has, of which XLA allocates its share; None for all that
            is free of this one.
        weights: the kinds of weights: "compressed", as `models.load` has them by default; "exact",
            compressed, and decompressed first where "compressed" fuses products; "plain";
            "offloaded".
        longest: whether to find the longest contexts.
        progress: whether to show a progress bar while the weights are compressed.
    """

    model: str | None
    batches: Sequence[int]
    prompt: int
    tokens: int
    memory: int | None
    weights: Sequence[str]
    longest: bool
    progress: bool


def measure(task: Task, emit: Callable[[Event], None]) -> None:
    """Measures one way; tells on the standard error what it is at.

    Args:
        task: what to measure.
        emit: a function that gets each event, of which "event" is the kind: "start" has the device
            and the model, "weights" their bytes, "row" the figures of a kind of weights with a
            batch, "longest" a longest context, "error" why there is no more to come.
    """
    try:
        _measure(task, emit)
    except (OSError, ValueError, RuntimeError) as error:
        emit({"event": "error", "error": str(error)})


def _measure(task: Task, emit: Callable[[Event], None]) -> None:
    start_backends()
    model = open_model(task.model)
    config = model.config
    if (needed := task.prompt + task.tokens - 1) > config.max_length:
        raise ValueError(
            f"prompts of {task.prompt} tokens and {task.tokens} more take {needed} positions, but "
            f"the model was made for {config.max_length}"
        )
    budget = free_bytes() if task.memory is None else read_budget(task.memory).usable
    start = {
        "event": "start",
        "version": df11_jax.__version__,
        "jax_version": jax.__version__,
        "device": describe_device(),
        "model": model.name,
        "layers": config.layers,
        "max_length": config.max_length,
        "prompt": task.prompt,
        "tokens": task.tokens,
        "budget": budget,
    }
    emit(start)
    say(f"{model.name} ...")
    placements = load_placements(model, progress=task.progress)
    placements = [weights for weights in placements if _kinds(weights, task)]
    for weights in placements:
        sizes = ("device_bytes", "host_bytes", "host_layers")
        event = {"event": "weights", "weights": weights.name}
        emit(event | {size: getattr(weights, size) for size in sizes})
    default = (1, 8) if jax.default_backend() == "cpu" else (1, 8, 64, 256)
    requests = [Request(n, task.prompt, task.tokens) for n in sorted(task.batches or default)]
    for weights in placements:
        _measure_weights(weights, _kinds(weights, task), config, requests, budget, emit)
    if task.longest and budget is not None:
        for weights in placements:
            kind = _kinds(weights, task)[0]
            say(f"longest context, {kind} ...")
            try:
                longest = _find_longest(weights, _config_of(kind, config), budget)
            except jax.errors.JaxRuntimeError as error:  # the others may be found
                say(f"not found: {error}")
            else:
                emit({"event": "longest", "weights": kind, "context": longest})


def _kinds(weights: PlacedWeights, task: Task) -> list[str]:
    """The kinds to measure that have these weights."""
    kinds = ["compressed", "exact"] if weights.name == "compressed" else [weights.name]
    return [kind for kind in kinds if kind in task.weights]


def _config_of(kind: str, config: Config) -> Config:
    return dataclasses.replace(config, exact=kind != "compressed")


def _measure_weights(
    weights: PlacedWeights,
    kinds: Sequence[str],
    config: Config,
    requests: Sequence[Request],
    budget: int | None,
    emit: Callable[[Event], None],
) -> None:
    """Measures weights in each of their kinds with all batches."""
    device = jax.devices()[0]
    params: Params | None = None
    same = set()  # batches with which "exact" would be the program of "compressed"
    for kind in kinds:
        for request in requests:
            if kind == "exact" and request.batch in same:
                continue
            say(f"batch {request.batch}, {kind} ...")
            row: Event = {"event": "row", "weights": kind, "batch": request.batch}
            try:
                own = _config_of(kind, config)
                programs = compile_request(weights.shapes(device), own, request)
                plan = read_plan(programs, weights)
                row["plan"] = plan._asdict() | {"peak": plan.peak}
                row["fused"] = is_fused_in(programs.decode)
                if not row["fused"]:
                    same.add(request.batch)
                if budget is not None and plan.peak > budget:
                    row["not_run"] = "does not fit"
                else:
                    if params is None:
                        params = weights.put(device)
                    row |= _run(programs, params, own, request)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row["not_run"] = "out of memory"
            emit(row)


def _run(
    programs: RequestPrograms, params: Params, config: Config, request: Request
) -> dict[str, Any]:
    """The figures of programs that fit."""
    device = jax.devices()[0]
    before = _device_peak(device)
    result = run(programs, params, config, request, _REPEATS, _MOST_SECONDS)
    after = _device_peak(device)
    figures: dict[str, Any] = {
        "device_peak": after if after > before else None,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "bits": result.digests(),
    }
    is_compressed = any(map(is_df11, jax.tree.leaves(params, is_leaf=is_df11)))
    if is_compressed and not is_fused_in(programs.decode):
        figures["decompress_seconds"] = _time_decompression(params, config, request.batch)
    return figures


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


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Measures, and prints events."""
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    # What libraries print must not come in between.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        print(json.dumps(event), file=output, flush=True)

    measure(Task(**json.loads(sys.argv[1])), emit)


if __name__ == "__main__":
    main()
