"""How fast does df11_jax.models load a model, and what does it take on hosts and devices?

    pip install ".[benchmark,models]"
    python benchmarks/models.py loading
    python benchmarks/models.py hosts
    python benchmarks/models.py memory

Each prints what it measured; nothing is asserted here.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

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
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.safetensors"
        _, largest = _save_model(path)
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
    with _peak_memory() as peak:
        start, cpu, reader = time.perf_counter(), os.times(), time.thread_time()
        params = models.load_params(
            source, config, compress=how != "plain", verify=how != "unverified", threads=threads
        )
        jax.block_until_ready(params)
        seconds, used = time.perf_counter() - start, os.times()
        reader = time.thread_time() - reader
    report = size_report(params)
    figures = {
        "rate": report.nbytes_before / seconds,
        "nbytes": report.nbytes,
        "peak": peak[0],
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
@click.option("--devices", default=4, show_default=True, help="Of all processes.")
def hosts(devices: int) -> None:
    """Bytes that each of several processes reads, and memory of its host.

    With random weights of Llama-3.2-1B's shapes. Each process has a file of its own, as each host
    may have, of which the operating system has nothing in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "0.safetensors"
        total, largest = _save_model(path)
        print(f"model: {total / GIGA:.2f} GB, largest tensor: {largest / GIGA:.2f} GB")
        for count, stages in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            processes = []
            for index in range(count):
                own = path.with_stem(str(index))
                if not own.exists():
                    shutil.copyfile(path, own)
                numbers = (port, count, index, devices // count, stages)
                command = [sys.executable, __file__, "load-part", str(own), *map(str, numbers)]
                processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            for index, process in enumerate(processes):
                part = json.loads(process.communicate()[0].splitlines()[-1])  # gloo prints, too
                print(
                    f"{devices} devices, {stages} stages, process {index} of {count}: reads "
                    f"{part['read'] / total:.0%}, has {part['nbytes'] / GIGA:.2f} GB, on the way "
                    f"at most {(part['peak'] - part['nbytes']) / GIGA:.2f} GB more"
                )


@commands.command(hidden=True)
@click.argument("path", type=click.Path(path_type=pathlib.Path))
@click.argument("port", type=int)
@click.argument("count", type=int)
@click.argument("index", type=int)
@click.argument("devices", type=int)
@click.argument("stages", type=int)
def load_part(
    path: pathlib.Path, port: int, count: int, index: int, devices: int, stages: int
) -> None:
    """One process of `hosts`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    import jax

    from df11_jax import checkpoints, models

    jax.distributed.initialize(f"localhost:{port}", count, index)
    jax.local_devices()  # starts the backend, of which nothing is to be counted
    config = models.read_config(LLAMA_3_2_1B)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet would stay in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    source, read = checkpoints.open_checkpoint(path), _bytes_read()
    with _peak_memory() as peak:
        params = models.load_params(source, config, devices=jax.devices(), stages=stages)
        jax.block_until_ready(params)
    here = (x.addressable_shards for x in jax.tree.leaves(params))
    nbytes = sum(shard.data.nbytes for shards in here for shard in shards)
    print(json.dumps({"read": _bytes_read() - read, "nbytes": nbytes, "peak": peak[0]}))


def _save_model(path: pathlib.Path) -> tuple[int, int]:
    """Saves a model; returns the bytes of all tensors, and of the largest."""
    from safetensors.numpy import save_file

    from df11_jax import models

    source = models.RandomSource(models.read_config(LLAMA_3_2_1B))
    save_file({name: source.read(name) for name in source.tensors}, path)
    sizes = [info.nbytes for info in source.tensors.values()]
    return sum(sizes), max(sizes)


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


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Watches memory; afterwards, the list has the most that there was more than at the start."""
    before, peak, done = _anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous_memory() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _bytes_read() -> int:
    """Bytes that this process had the system read from disks."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def _anonymous_memory() -> int:
    """Bytes of memory that is not that of mapped files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


if __name__ == "__main__":
    commands()
