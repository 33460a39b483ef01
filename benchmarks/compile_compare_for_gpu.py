"""What would `df11-jax compare` take on an H100, and which contexts would fit? Needs none.

    pip install "jax[cuda13]" ".[cli,models]"
    python benchmarks/compile_compare_for_gpu.py --batch 1 --batch 8 --batch 64 --memory 32GB

Only shapes go in, of Llama-3.1-8B or of a `config.json`. Prints one line of JSON for each batch and
placement of the weights: bytes on the device and in host memory, and what is copied from there in
the token loop. With `--memory` of a device, further lines: the longest context that fits into what
XLA allocates of it.
"""

import dataclasses
import json
import pathlib
import re

import click
import h100  # first: it sets what XLA reads once
import jax
import shapes
from jax._src import compiler
from jax._src.lib import xla_client

from df11_jax import models
from df11_jax._units import parse_bytes
from df11_jax.bench.compared_model import LLAMA_3_1_8B
from df11_jax.bench.placements import PlacedWeights, make_placements
from df11_jax.bench.plan import find_longest, make_plan, request_of_length
from df11_jax.bench.request import Request, trace
from df11_jax.models.budget import read_budget


class Compiler:
    """Compiles for an H100.

    JAX does not believe that a device that is not there has host memory. So programs are lowered
    for a CPU's memories, and what comes of that is given to XLA by hand.
    """

    def __init__(self) -> None:
        (device,) = h100.devices()
        self._devices = xla_client.DeviceList((device,))
        self._client = device.client
        self._options = compiler.get_compile_options(num_replicas=1, num_partitions=1)

    def __call__(self, traced: jax.stages.Traced):
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        return self._client.compile(module, self._devices, self._options)


def plan_request(
    compile_one: Compiler, weights: PlacedWeights, config: models.Config, request: Request
):
    """The plan of a request, and the compiled token loop."""
    programs = trace(weights.shapes(jax.devices("cpu")[0]), config, request)
    prefill, decode = map(compile_one, programs)
    stats = (program.get_compiled_memory_stats() for program in (prefill, decode))
    return make_plan(*stats, weights), decode


def cache_bytes(config: models.Config, request: Request) -> int:
    cache = jax.eval_shape(lambda: models.init_cache(config, request.batch, request.length))
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
    fields = LLAMA_3_1_8B if file is None else json.loads(file.read_text())
    config = dataclasses.replace(models.read_config(fields), exact=True)  # like `df11-jax compare`
    compile_one = Compiler()
    placements = make_placements(
        *(shapes.param_shapes(config, compress=compress) for compress in (True, False))
    )
    for batch in batches:
        for weights in placements:
            request = Request(batch, prompt, tokens)
            planned, decode = plan_request(compile_one, weights, config, request)
            stats = decode.get_compiled_memory_stats()
            line = {
                "way": weights.name,
                "batch": batch,
                "device_weights": weights.device_bytes,
                "host_weights": weights.host_bytes,
                "host_layers": weights.host_layers,
                "host_arguments": stats.host_argument_size_in_bytes,
                "cache": cache_bytes(config, request),
                "decode_temporary": stats.temp_size_in_bytes,
                "block": shapes.block_nbytes(config),
                **planned._asdict(),
                **describe_copies(decode),
            }
            print(json.dumps(line), flush=True)
    if memory is None:
        return
    budget = read_budget(memory).usable
    for weights in placements:

        def peak(length: int, weights: PlacedWeights = weights) -> int:
            planned, _ = plan_request(compile_one, weights, config, request_of_length(length))
            return planned.peak

        longest = find_longest(peak, budget, config.max_length)
        print(json.dumps({"way": weights.name, "budget": budget, "longest": longest}), flush=True)


if __name__ == "__main__":
    main()
