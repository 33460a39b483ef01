"""Plans `df11-jax compare` for an H100, without one: memory, and the longest contexts.

    pip install "jax[cuda13]" ".[cli,models]"
    python benchmarks/compile_compare_for_gpu.py --batch 1 --batch 8 --batch 64 --memory 32GB

Only shapes go in, of Llama-3.1-8B or of a `config.json`. Prints one line of JSON for each batch and
way to hold the weights: bytes on the device and in host memory, and what is copied from there in
the token loop. With `--memory` of a device, further lines: the longest context that fits into what
XLA allocates of it.
"""

import json
import pathlib
import re
import sys

import click
import compile_for_gpu  # first: it sets what XLA reads once
import jax
from jax._src import compiler
from jax._src.lib import xla_client
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "models"))
import shapes

from df11_jax import models
from df11_jax._units import parse_bytes
from df11_jax.bench import compare, generation, plan, ways
from df11_jax.models.budget import read_budget


class Compiler:
    """Compiles for an H100.

    JAX does not believe that a device that is not there has host memory. So programs are lowered
    for a CPU's memories, and what comes of that is given to XLA by hand.
    """

    def __init__(self) -> None:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=compile_for_gpu.H100, topology="1x1x1"
        )
        self._devices = xla_client.DeviceList((topology.devices[0],))
        self._client = topology.devices[0].client
        self._options = compiler.get_compile_options(num_replicas=1, num_partitions=1)

    def __call__(self, traced: jax.stages.Traced):
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        return self._client.compile(module, self._devices, self._options)


def plan_job(compile_one: Compiler, way: ways.Way, config: models.Config, job: generation.Job):
    """The plan of a job, and the compiled token loop."""
    programs = generation.trace(way.shapes(jax.devices("cpu")[0]), config, job)
    prefill, decode = map(compile_one, programs)
    stats = (program.get_compiled_memory_stats() for program in (prefill, decode))
    return plan.make_plan(*stats, way), decode


def cache_bytes(config: models.Config, job: generation.Job) -> int:
    cache = jax.eval_shape(lambda: models.init_cache(config, job.batch, job.length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def describe_copies(decode) -> dict:
    """What the token loop copies from host memory (which XLA calls S(5)), and how."""
    (module,) = decode.hlo_modules()
    text = module.to_string()
    started = re.findall(
        r"= \(\((\w+\[[\d,]*\])\S*S\(5\)[^)]*\), (\w+\[[\d,]*\])\S* .*-start\(", text
    )
    return {"copies": sorted(started)}


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, path_type=pathlib.Path))
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8, 64))
@click.option("--prompt-length", "prompt", type=int, default=128)
@click.option("--tokens", type=int, default=32)
@click.option("--memory", type=parse_bytes)
def main(file, batches, prompt, tokens, memory) -> None:
    fields = compare.LLAMA_3_1_8B if file is None else json.loads(file.read_text())
    config = models.read_config(fields)
    compile_one = Compiler()
    all_ways = ways.make_ways(
        *(shapes.param_shapes(config, compress=compress) for compress in (True, False))
    )
    for batch in batches:
        for way in all_ways:
            job = generation.Job(batch, prompt, tokens)
            planned, decode = plan_job(compile_one, way, config, job)
            stats = decode.get_compiled_memory_stats()
            line = {
                "way": way.name,
                "batch": batch,
                "device_weights": way.device_bytes,
                "host_weights": way.host_bytes,
                "host_layers": way.host_layers,
                "host_arguments": stats.host_argument_size_in_bytes,
                "cache": cache_bytes(config, job),
                "decode_temporary": stats.temp_size_in_bytes,
                "block": shapes.block_nbytes(config),
                **planned._asdict(),
                **describe_copies(decode),
            }
            print(json.dumps(line), flush=True)
    if memory is None:
        return
    budget = read_budget(memory).usable
    for way in all_ways:

        def peak(length: int, way: ways.Way = way) -> int:
            return plan_job(compile_one, way, config, plan.job_of_length(length))[0].peak

        longest = plan.find_longest(peak, budget, config.max_length)
        print(json.dumps({"way": way.name, "budget": budget, "longest": longest}), flush=True)


if __name__ == "__main__":
    main()
