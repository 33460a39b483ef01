"""How fast does df11_jax.models load a model, and what does it take on host and device?

    pip install ".[benchmark,models]"
    python benchmarks/models.py loading
    python benchmarks/models.py memory

Each prints what it measured; nothing is asserted here.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import click
from known_configs import KNOWN

GIGA = 1e9
LLAMA_3_2_1B = KNOWN["Llama-3.2-1B"]


@click.group()
def commands() -> None:
    """Measures df11_jax.models."""


@commands.command()
@click.option("--cores", default=2, show_default=True)
@click.option("--threads", type=int, help="Threads to compress with. [default: the cores]")
@click.option("--repeats", default=3, show_default=True)
def loading(cores: int, threads: int | None, repeats: int) -> None:
    """Bytes of bf16 a second, and memory of the host, with random weights of Llama-3.2-1B's shapes.

    Reads from files that were just written, which the operating system has in memory. What takes
    CPU time is told in times of a copy of all weights, to memory that was touched before. With many
    threads, what the thread that reads takes is nearly all that is not shared among them.
    """
    from safetensors.numpy import save_file

    from df11_jax import models

    with tempfile.TemporaryDirectory() as folder:
        config = models.read_config(LLAMA_3_2_1B)
        source = models.RandomSource(config)
        tensors = {name: source.read(name) for name in source.tensors}
        largest = max(tensor.nbytes for tensor in tensors.values())
        path = pathlib.Path(folder) / "model.safetensors"
        save_file(tensors, path)
        del tensors
        for how in ("compress", "unverified", "plain"):
            runs = []
            for _ in range(repeats):
                # A process may not change the number of XLA's threads once it has begun.
                command = [sys.executable, __file__, "load-one", str(path), how, str(cores)]
                command.append(str(threads or cores))
                runs.append(json.loads(subprocess.check_output(command)))
            best = max(runs, key=lambda run: run["rate"])
            beside = max(run["peak"] - run["nbytes"] for run in runs)
            print(
                f"{how:10}  {best['rate'] / GIGA:.2f} GB/s, best of {repeats}; "
                f"{best['nbytes'] / GIGA:.2f} GB, on the way at most {beside / GIGA:.2f} GB more "
                f"(largest tensor: {largest / GIGA:.2f} GB)"
            )
            user, system, reader = (best[part] / best["copy"] for part in ("user", "sys", "reader"))
            print(
                f"            CPU time: {user:.1f} copies, {system:.1f} of the system; "
                f"of both, the thread that reads {reader:.1f}"
            )


@commands.command(hidden=True)
@click.argument("path", type=click.Path(path_type=pathlib.Path))
@click.argument("how")
@click.argument("cores", type=int)
@click.argument("threads", type=int)
def load_one(path: pathlib.Path, how: str, cores: int, threads: int) -> None:
    """One process of `loading`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import jax

    from df11_jax import checkpoints, models, size_report

    config = models.read_config(LLAMA_3_2_1B)
    source = checkpoints.open_checkpoint(path)
    jax.numpy.zeros(1).block_until_ready()
    before, peak, done = _anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu, reader = time.perf_counter(), os.times(), time.thread_time()
    params = models.load_params(
        source, config, compress=how != "plain", verify=how != "unverified", threads=threads
    )
    jax.block_until_ready(params)
    seconds, used = time.perf_counter() - start, os.times()
    reader = time.thread_time() - reader
    done.set()
    watcher.join()
    report = size_report(params)
    figures = {
        "rate": report.nbytes_before / seconds,
        "nbytes": report.nbytes,
        "peak": peak[0] - before,
        "user": used.user - cpu.user,
        "sys": used.system - cpu.system,
        "reader": reader,
        "copy": _copy_seconds(report.nbytes_before),
    }
    print(json.dumps(figures))


def _copy_seconds(nbytes: int) -> float:
    """The CPU time of copying so many bytes, to memory that was touched before."""
    import numpy as np

    part = 2**28
    source, target = np.zeros(part, np.uint8), np.ones(part, np.uint8)
    source[:] = 1
    start = time.thread_time()
    for _ in range(4):
        np.copyto(target, source)
    return (time.thread_time() - start) * nbytes / (4 * part)


@commands.command()
@click.option("--batch", default=2, show_default=True)
@click.option("--length", default=2048, show_default=True, help="Of the prompt, and of the text.")
def memory(batch: int, length: int) -> None:
    """Bytes on the device while generating, as XLA plans it for the default device.

    For an H100, without one: `python benchmarks/compile_models_for_gpu.py`.
    """
    # XLA's default scheduler on CPU runs independent operations at once, in more memory.
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    import shapes

    from df11_jax import models

    config = models.read_config(LLAMA_3_2_1B)
    print(f"one block: {shapes.block_nbytes(config) / GIGA:.3f} GB")
    for compress in (True, False):
        params = shapes.param_shapes(config, compress=compress)
        programs = models.compile_programs(
            params, config, batch=batch, prompt=length, tokens=length
        )
        sizes = models.measure_memory(params, programs)
        parts = ", ".join(f"{name} {n / GIGA:.3f}" for name, n in sizes._asdict().items())
        print(
            f"{'compressed' if compress else 'plain':10}  peak {sizes.peak / GIGA:.3f} GB: {parts}"
        )


def _anonymous_memory() -> int:
    """Bytes of memory that is not that of mapped files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


if __name__ == "__main__":
    commands()
