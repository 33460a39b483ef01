"""The memory that generation takes on the device, as XLA plans it."""

from typing import NamedTuple

import jax

from df11_jax._size_report import size_report
from df11_jax.models._parallel import on_one_device
from df11_jax.models._programs import Programs
from df11_jax.models._transformer import Params


class Memory(NamedTuple):
    """Bytes on the device during generation; if there are several devices, on each of them.

    Attributes:
        weights: the weights as they are held, compressed or not.
        plain_weights: the weights as they would be without compression.
        cache: keys and values.
        prefill: temporary memory, at its peak, while the prompts are read.
        decode: temporary memory, at its peak, while tokens are chosen.
    """

    weights: int
    plain_weights: int
    cache: int
    prefill: int
    decode: int

    @property
    def peak(self) -> int:
        """Weights, cache and temporary memory at the higher of the two peaks."""
        return self.weights + self.cache + max(self.prefill, self.decode)


def measure_memory(params: Params, programs: Programs) -> Memory:
    """The memory that parameters, and the programs compiled for them, take on the device."""
    report = size_report(on_one_device(params))
    return Memory(
        weights=report.nbytes,
        plain_weights=report.nbytes_before,
        cache=programs.cache_bytes,
        prefill=_temporary(programs.prefill),
        decode=_temporary(programs.decode),
    )


def _temporary(program: jax.stages.Compiled) -> int:
    stats = program.memory_analysis()
    assert stats is not None, "XLA reports memory on CPU, GPU and TPU"
    return stats.temp_size_in_bytes
