"""The ways of `df11-jax compare`, each in a process of its own.

This one asks for no devices: JAX would reserve most of their memory for it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from df11_jax._progress import say
from df11_jax.bench.one_way import Event, Task

# XLA multiplies by Triton's kernels on GPUs where its tuning finds them faster, but for these it
# copies each layer out of its stack first, which the tuning does not see. cuBLAS reads the layer
# where it is.
_TRITON = "--xla_gpu_enable_triton_gemm"
WAYS: Mapping[str, str] = {"default": "", "cublas": f"{_TRITON}=false"}
KINDS = ("compressed", "exact", "plain", "offloaded")
# -P: a source tree that is the current directory is not compiled.
_COMMAND = (sys.executable, "-P", "-m", "df11_jax.bench.one_way")
# Bits are compared under XLA's defaults, and layers in host memory wait for their copies.
_KINDS_OF = {"default": KINDS, "cublas": ("compressed", "plain")}


def compare_ways(task: Task, without: Collection[str]) -> Iterator[Event]:
    """Measures a model with its weights in each way.

    Args:
        task: what to measure.
        without: the names of ways to leave out.

    Yields:
        What `measure` emits, with the name of the way under "xla". Ways that are left out because
        of the device have an event "left out", and ways that failed an event "error".

    Raises:
        RuntimeError: a way failed before it began to measure.
    """
    device: dict[str, Any] | None = None
    for way, kinds in kinds_by_way(task.weights, without).items():
        if device is not None and device["platform"] != "gpu":
            why = f"XLA's flag {WAYS[way]} is for GPUs: here this way is the same as the other"
            yield {"event": "left out", "xla": way, "why": why}
            continue
        first = device is None
        own = dataclasses.replace(task, weights=kinds, longest=task.longest and first)
        for event in _events(own, way):
            if event["event"] == "start":
                device = event["device"]
            if event["event"] == "error" and device is None:
                raise RuntimeError(event["error"])
            # What all ways have in common is told once.
            if first or event["event"] not in ("start", "weights"):
                yield event | {"xla": way}


def kinds_by_way(weights: Collection[str], without: Collection[str]) -> dict[str, list[str]]:
    """The kinds of weights that are measured in each way; ways without any are left out."""
    ways = {
        way: [kind for kind in weights if kind in kinds]
        for way, kinds in _KINDS_OF.items()
        if way not in without
    }
    return {way: kinds for way, kinds in ways.items() if kinds}


def _events(task: Task, way: str) -> Iterator[Event]:
    """The events of a process for one way, which ends with this generator."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_TRITON)]
    environment = os.environ | {"XLA_FLAGS": " ".join([*flags, WAYS[way]]).strip()}
    say(f"XLA's way {way}{WAYS[way] and f' ({WAYS[way]})'} ...")
    with _without_interrupts():
        process = subprocess.Popen(
            [*_COMMAND, json.dumps(dataclasses.asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    try:
        yield from map(json.loads, process.stdout)
        if status := process.wait():
            error = f"its process ended with status {status}; what it printed is above"
            yield {"event": "error", "error": error}
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Blocks interrupts, as processes that are started here inherit it, until this ends.

    A terminal interrupts these processes, too, but this one ends them. To ignore interrupts there
    would be too late: while they import, they would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
