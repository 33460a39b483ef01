"""Random weights of any size, for tests and benchmarks."""

import math
import zlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16

from df11_jax._files.source import TensorInfo
from df11_jax.models._config import Config
from df11_jax.models._weights import list_places, tensor_shape


class RandomSource:
    """Tensors of a transformer, drawn when they are read: a `TensorSource` for `load_params`.

    Attributes:
        tensors: all tensors by name.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        """Names the tensors.

        Args:
            config: the configuration of the transformer.
            seed: the seed of all draws.
        """
        self.tensors: dict[str, TensorInfo] = {}
        for name, places in list_places(config).items():
            shape = tensor_shape(places)
            nbytes = 2 * math.prod(shape)
            self.tensors[name] = TensorInfo(shape, "BF16", nbytes, nbytes)
        self._seed = seed
        self._scale_mean = 0.0 if config.unit_offset else 1.0

    def read(self, name: str) -> BFloat16[np.ndarray, "..."]:
        """Draws a tensor, of such a size that activations neither grow nor vanish."""
        shape = self.tensors[name].shape
        draws = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        values = draws.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            values *= np.float32(shape[-1] ** -0.5)
        else:
            values *= np.float32(0.1)
            values += np.float32(self._mean(name))
        return values.astype(jnp.bfloat16)

    def _mean(self, name: str) -> float:
        """The mean of a vector."""
        if name.endswith(("layer_scalar", "linear_attn.norm.weight")):
            return 1.0
        if name.endswith("A_log"):
            return -3.0  # states that last for some tens of tokens
        return self._scale_mean if name.endswith("norm.weight") else 0.0
