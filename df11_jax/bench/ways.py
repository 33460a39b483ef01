"""Three ways to hold a model's weights: plain, compressed, and plain but partly in host memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from df11_jax._decode import decompress_params
from df11_jax._size_report import size_report
from df11_jax.checkpoints import TensorSource
from df11_jax.models import Config, Params, load_params


class Way(NamedTuple):
    """A model's weights, held in one of the ways.

    Attributes:
        name: "compressed", "offloaded" or "plain".
        params: what is to be on the device, and under "host_layers" what is to be in host memory:
            numpy arrays, or shapes.
    """

    name: str
    params: Params

    @property
    def device_bytes(self) -> int:
        """Of weights on the device."""
        return size_report({k: v for k, v in self.params.items() if k != "host_layers"}).nbytes

    @property
    def host_bytes(self) -> int:
        """Of weights in host memory."""
        return size_report(self.params.get("host_layers", {})).nbytes

    @property
    def host_layers(self) -> int:
        """How many layers are in host memory."""
        return count_layers(self.params["host_layers"]) if "host_layers" in self.params else 0

    def shapes(self, device: jax.Device) -> Params:
        """Shapes of the parameters on a device, for compiling."""
        return self._place(
            device, lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        )

    def put(self, device: jax.Device) -> Params:
        """The parameters, on a device and in the host memory that it can read."""
        return jax.block_until_ready(self._place(device, jax.device_put))

    def _place(self, device: jax.Device, place: Callable[[Any, Any], Any]) -> Params:
        def place_part(name: str, part: Any) -> Any:
            kind = "pinned_host" if name == "host_layers" else None
            where = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            return jax.tree.map(lambda x: place(x, where), part)

        return {name: place_part(name, part) for name, part in self.params.items()}


def load_ways(source: TensorSource, config: Config, *, progress: bool) -> list[Way]:
    """Compresses a model on the host, verifies it, and decompresses it there for the plain ways.

    So each tensor is read, or drawn, only once.

    Args:
        source: of the tensors.
        config: of the decoder.
        progress: show a progress bar.

    Returns:
        As `make_ways`, with numpy arrays.

    Raises:
        ValueError: as `load_params`.
        RuntimeError: JAX may not use the CPU.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        compressed = load_params(source, config, progress=progress)
        plain = decompress_params(compressed)
    return make_ways(*(jax.tree.map(np.asarray, params) for params in (compressed, plain)))


def make_ways(compressed: Params, plain: Params) -> list[Way]:
    """The ways to hold a model, those that take less of the device first.

    Offloaded are the last layers, as few as leave no more on the device than the compressed model
    has there: both then have the same memory for the rest. If all layers are too few, because of
    large embeddings, all are.

    Args:
        compressed: parameters of the decoder: numpy arrays, or shapes.
        plain: the same, not compressed.
    """
    too_much = size_report(plain).nbytes - size_report(compressed).nbytes
    layers = count_layers(plain["layers"])
    layer_bytes = size_report(plain["layers"]).nbytes // layers
    offloaded = offload(plain, min(layers, math.ceil(too_much / layer_bytes)))
    return [Way("compressed", compressed), Way("offloaded", offloaded), Way("plain", plain)]


def offload(plain: Params, count: int) -> Params:
    """The same parameters, the last `count` layers under "host_layers"."""

    def part(begin: int, end: int) -> Any:
        def cut(x: Any) -> Any:
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((end - begin, *x.shape[1:]), x.dtype)
            return x[begin:end]

        return jax.tree.map(cut, plain["layers"])

    layers = count_layers(plain["layers"])
    first, last = part(0, layers - count), part(layers - count, layers)
    return plain | {"layers": first} | ({"host_layers": last} if count else {})


def count_layers(stack: Params) -> int:
    """How many layers a stack of plain layers has."""
    return jax.tree.leaves(stack)[0].shape[0]
