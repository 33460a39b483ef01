"""The memory of a device, and the part of it that XLA allocates from."""

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax

# XLA allocates from this fraction of the device's memory, unless one of the variables is set; the
# first of them that is set counts.
DEFAULT_FRACTION = 0.75
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# The largest fraction to advise: CUDA itself, its libraries and the display need some memory, too.
MOST_FRACTION = 0.95


class Budget(NamedTuple):
    """The memory of one device, in bytes.

    Attributes:
        memory: all of its memory.
        fraction: the fraction of it that XLA allocates from.
        device: the name of the device; None if it is not here.
    """

    memory: int
    fraction: float
    device: str | None

    @property
    def usable(self) -> int:
        """The bytes that XLA allocates from."""
        return int(self.memory * self.fraction)


def read_budget(memory: int | None) -> Budget:
    """Finds out the memory of each device.

    Args:
        memory: the bytes of memory that a device has; None to ask the default device.

    Raises:
        ValueError: the default device is to be asked, but is no GPU; or a variable of the
            environment is no fraction.
    """
    fraction = _read_fraction(os.environ)
    if memory is not None:
        return Budget(memory, fraction, None)
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats or "bytes_limit" not in stats:
        raise ValueError(
            f"the default device, {device.device_kind}, is no GPU that tells its memory: say how "
            "much there is, with --memory 24GB"
        )
    return Budget(round(stats["bytes_limit"] / fraction), fraction, device.device_kind)


def _read_fraction(environment: Mapping[str, str]) -> float:
    for name in FRACTION_VARIABLES:
        if text := environment.get(name):
            try:
                fraction = float(text)
            except ValueError:
                fraction = math.nan
            if not 0 < fraction <= 1:
                raise ValueError(f"{name} is {text!r}, expected a fraction of the device's memory")
            return fraction
    return DEFAULT_FRACTION
