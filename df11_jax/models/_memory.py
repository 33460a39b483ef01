"""What generation takes on the device, as XLA has planned it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from df11_jax._size_report import size_report
from df11_jax.models import _generate
from df11_jax.models._config import Config
from df11_jax.models._parallel import find_mesh, on_one_device
from df11_jax.models._sampling import Sampling
from df11_jax.models._transformer import Params


class Memory(NamedTuple):
    """Bytes on the device during generation.

    Of several devices, those on each.

    Attributes:
        weights: as they are held, compressed or not.
        plain_weights: as they would be, not compressed.
        cache: keys and values.
        prefill: what reading the prompts takes beside those, at its peak.
        decode: what choosing each token takes beside those, at its peak.
    """

    weights: int
    plain_weights: int
    cache: int
    prefill: int
    decode: int

    @property
    def peak(self) -> int:
        """All of it together, at the higher of the two peaks."""
        return self.weights + self.cache + max(self.prefill, self.decode)


class Programs(NamedTuple):
    """The programs that `generate` runs, compiled; it then finds them so.

    Attributes:
        prefill: reads the prompts.
        decode: runs the token loop.
        cache_bytes: of keys and values.
    """

    prefill: jax.stages.Compiled
    decode: jax.stages.Compiled
    cache_bytes: int


def compile_programs(
    params: Params,
    config: Config,
    *,
    batch: int,
    prompt: int,
    tokens: int,
    sampling: Sampling | None = None,
    stops: int = 0,
    every: int = 8,
) -> Programs:
    """Compiles what `generate` would run.

    Args:
        params: plain or compressed parameters, or their shapes, with shardings if they are
            divided.
        config: of the decoder.
        batch: how many prompts.
        prompt: how many tokens the longest has.
        tokens: how many to generate for each.
        sampling: how to choose them.
        stops: how many stop tokens there are.
        every: how many tokens to generate between callbacks.
    """
    sampling = (sampling or Sampling()).checked()
    length = _generate.cache_length(prompt, tokens)
    padded = _generate.padded_length(prompt, tokens, length)
    prompts = jax.ShapeDtypeStruct((batch, padded), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    stop = jax.ShapeDtypeStruct((stops,), jnp.int32)
    mesh = find_mesh(params)
    lowered = _generate.prefill.lower(
        params, prompts, lengths, sampling, keys, stop, length, config, mesh
    )
    prefill, state = lowered.compile(), lowered.out_info
    if mesh is not None:
        state = jax.tree.map(_with_sharding, state, prefill.output_shardings)
    decode = _generate.decode.lower(params, state, every, sampling, keys, stop, every, config, mesh)
    cache = jax.tree.leaves(on_one_device(state.cache))
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
    return Programs(prefill, decode.compile(), cache_bytes)


def measure_memory(params: Params, programs: Programs) -> Memory:
    """What parameters take on the device, and the programs compiled for them."""
    report = size_report(on_one_device(params))
    return Memory(
        weights=report.nbytes,
        plain_weights=report.nbytes_before,
        cache=programs.cache_bytes,
        prefill=_temporary(programs.prefill),
        decode=_temporary(programs.decode),
    )


def _with_sharding(shape: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _temporary(program: jax.stages.Compiled) -> int:
    stats = program.memory_analysis()
    assert stats is not None, "XLA reports memory on CPU, GPU and TPU"
    return stats.temp_size_in_bytes
