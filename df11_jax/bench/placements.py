"""Three placements of a model's weights: compressed, plain, and plain but partly in host memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax._decode import decompress_params
from df11_jax._size_report import size_report
from df11_jax.bench.compared_model import ComparedModel
from df11_jax.models import Params, load_params


class PlacedWeights(NamedTuple):
    """A model's weights in one of the placements.

    Attributes:
        name: the name of the placement: "compressed", "offloaded" or "plain".
        params: the parameters, numpy arrays or shapes; those under "host_layers" are to be in host
            memory, all others on the device.
    """

    name: str
    params: Params

    @property
    def device_bytes(self) -> int:
        """The bytes of the weights on the device."""
        return size_report({k: v for k, v in self.params.items() if k != "host_layers"}).nbytes

    @property
    def host_bytes(self) -> int:
        """The bytes of the weights in host memory."""
        return size_report(self.params.get("host_layers", {})).nbytes

    @property
    def host_layers(self) -> int:
        """The number of layers in host memory."""
        return count_layers(self.params["host_layers"]) if "host_layers" in self.params else 0

    def shapes(self, device: jax.Device) -> Params:
        """The shapes of the parameters on a device, for compiling."""
        return self._place(
            device, lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        )

    def put(self, device: jax.Device) -> Params:
        """The parameters, on a device and in the host memory that it can read."""
        return jax.block_until_ready(self._place(device, _put))

    def _place(self, device: jax.Device, place: Callable[[Any, Any], Any]) -> Params:
        def place_part(name: str, part: Any) -> Any:
            kind = "pinned_host" if name == "host_layers" else None
            where = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            return jax.tree.map(lambda x: place(x, where), part)

        return {name: place_part(name, part) for name, part in self.params.items()}


def _put(x: np.ndarray | jax.Array, where: jax.sharding.Sharding) -> jax.Array:
    """An array on a device, or in the host memory that it can read."""
    is_repeated = isinstance(x, np.ndarray) and x.ndim and len(x) > 1 and x.strides[0] == 0
    if not is_repeated or where.memory_kind == "pinned_host":
        return jax.device_put(x, where)
    # What all layers have is sent once.
    repeat = jax.jit(lambda layer: jnp.broadcast_to(layer, x.shape), out_shardings=where)
    return repeat(jax.device_put(x[:1], where))


def load_placements(model: ComparedModel, *, progress: bool) -> list[PlacedWeights]:
    """Compresses a model on the host, verifies it, and decompresses it there for the plain ones.

    So each tensor is read, or drawn, only once.

    Args:
        model: the model.
        progress: True for a progress bar.

    Returns:
        The placements in the order of `make_placements`, with numpy arrays.

    Raises:
        ValueError: `load_params` refuses a tensor.
        RuntimeError: JAX may not use the CPU.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        compressed = load_params(model.source, model.distinct, progress=progress)
        plain = decompress_params(compressed)

    def on_host(params: Params) -> Params:
        params = jax.tree.map(np.asarray, params)
        layers = jax.tree.map(lambda x: _repeat(x, model.config.layers), params["layers"])
        return params | {"layers": layers}

    return make_placements(on_host(compressed), on_host(plain))


def _repeat(stack: np.ndarray, layers: int) -> np.ndarray:
    """A stack of so many layers; of one layer, a view in which all are that one."""
    return np.broadcast_to(stack, (layers, *stack.shape[1:])) if len(stack) == 1 else stack


def make_placements(compressed: Params, plain: Params) -> list[PlacedWeights]:
    """The placements of a model: compressed, plain, offloaded.

    Offloaded are the last layers, as few as leave no more on the device than the compressed model
    has there: both then have the same memory for the rest. If all layers are too few, because of
    large embeddings, all are.

    Args:
        compressed: the compressed parameters: numpy arrays, or shapes.
        plain: the same parameters, not compressed.
    """
    too_much = size_report(plain).nbytes - size_report(compressed).nbytes
    layers = count_layers(plain["layers"])
    layer_bytes = size_report(plain["layers"]).nbytes // layers
    offloaded = offload(plain, min(layers, math.ceil(too_much / layer_bytes)))
    return [
        PlacedWeights("compressed", compressed),
        PlacedWeights("plain", plain),
        PlacedWeights("offloaded", offloaded),
    ]


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
    """The number of layers in a stack of plain layers."""
    return jax.tree.leaves(stack)[0].shape[0]
