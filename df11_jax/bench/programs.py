"""What is timed: decodes, the scan over blocks, and the copies that they are measured against."""

import concurrent.futures
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax._host_codec import available_threads
from df11_jax._scan import scan_blocks
from df11_jax._slices import decode_slices
from df11_jax.bench.workload import Workload


class Program(NamedTuple):
    """Something to time: `run()` starts it and returns what to wait for."""

    run: Callable[[], Any]
    calls: int  # of what is measured, in one run


def decode_program(workload: Workload) -> Program:
    """Decodes one slice after the other.

    On a CPU in a loop, where each decode writes over what the one before wrote: the page faults
    of new memory would cost more than the decoding.

    Elsewhere one after the other without a loop, because its counter would take a kernel between
    any two. Nothing is there but the decodes: each has an operand of its own for the index, so that
    XLA takes no two for the same, and all results are returned, so that it drops none. CUDA graphs
    are left out, which could run several at once.
    """
    slices = workload.slices
    calls = _calls(slices)

    def in_loop(arrays: Any) -> Any:
        def decode(i: Any, carry: Any) -> Any:
            return _add_one_of_each(carry, decode_slices(arrays, i % slices, after=carry))

        return jax.lax.fori_loop(0, calls, decode, jnp.float32(0))

    def in_line(arrays: Any, indices: Any) -> Any:
        return [decode_slices(arrays, index) for index in indices]

    if jax.default_backend() == "cpu":
        loop = jax.jit(in_loop)
        return Program(lambda: loop(workload.arrays), calls)
    line = jax.jit(in_line, compiler_options=_no_graphs())
    indices = [jnp.int32(i % slices) for i in range(calls)]
    return Program(lambda: line(workload.arrays, indices), calls)


def scan_program(workload: Workload) -> Program:
    """A scan over all slices as blocks, each of which uses one weight of each matrix."""

    def block(carry: Any, weights: Any, _: None) -> tuple[Any, None]:
        return _add_one_of_each(carry, weights), None

    jitted = jax.jit(lambda carry, arrays: scan_blocks(block, carry, arrays)[0])
    carry = jnp.float32(0)
    return Program(lambda: jitted(carry, workload.arrays), workload.slices)


def _add_one_of_each(carry: Any, decoded: Any) -> Any:
    """Adds a weight of each matrix: XLA would not decode others, where its own operations do."""
    return sum((matrix[0, 0].astype(jnp.float32) for matrix in decoded), carry)


def copy_programs(moved_bytes: float, slices: int) -> dict[str, Program]:
    """Copies on the device that move `moved_bytes` each, read and written taken together.

    Returns:
        The copy as XLA does it, by the driver's copy function on a GPU, and as a kernel. On a CPU,
        numpy's with as many threads as the decoder has.
    """
    words = max(1, round(moved_bytes / 8))
    if jax.default_backend() == "cpu":
        return {"copy": _host_copy(words, slices)}
    calls = _calls(slices)
    sources = [jnp.full(words, i, jnp.uint32) for i in range(slices)]
    operands = [sources[i % slices] for i in range(calls)]
    copy = jax.jit(lambda arrays: [jnp.copy(a) for a in arrays], compiler_options=_no_graphs())
    invert = jax.jit(lambda arrays: [~a for a in arrays], compiler_options=_no_graphs())
    return {
        "copy": Program(lambda: copy(operands), calls),
        "copy kernel": Program(lambda: invert(operands), calls),
    }


def memory_needed(weights: int, slices: int, blocks: int = 0) -> int:
    """The bytes of device memory for measuring a workload, or a scan over `blocks` blocks."""
    # Elsewhere the results of two runs are held: that of one while the next is on its way.
    results = 1 if jax.default_backend() == "cpu" else 2 * _calls(slices)
    # A slice: drawn as float32, and bfloat16 or compressed. A result: decoded, or a copy's.
    return weights * (8 * slices + 2 * (results + slices) + math.ceil(1.4 * blocks))


def _no_graphs() -> dict[str, Any] | None:
    gpu = jax.default_backend() == "gpu"
    return {"xla_gpu_graph_min_graph_size": 2**30} if gpu else None


def _calls(slices: int) -> int:
    """The number of calls of a program: of all slices, and enough of them."""
    # A CPU should use most memory not for the first time; a GPU should not be done before the host
    # has sent the next run.
    fewest = 8 if jax.default_backend() == "cpu" else 4
    return slices * math.ceil(fewest / slices)


def _host_copy(words: int, slices: int) -> Program:
    # Smaller parts are copied sooner than another thread is woken.
    threads = max(1, min(available_threads(), words // 2**18))
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    sources = [np.full(words, i, np.uint32) for i in range(slices)]
    target = np.zeros(words, np.uint32)
    bounds = [words * i // threads for i in range(threads + 1)]
    parts = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]

    def copy_all() -> None:
        for source in sources:
            others = [pool.submit(np.copyto, target[p], source[p]) for p in parts[1:]]
            np.copyto(target[parts[0]], source[parts[0]])
            concurrent.futures.wait(others)

    return Program(copy_all, slices)
