"""Lossless compression of bfloat16 weights in JAX.

Weights are kept compressed in device memory, at about two thirds of their size, and decompressed
bit for bit inside jitted programs, one transformer block at a time.
"""

from importlib.metadata import version as _version

from df11_jax._array import DF11Array, DF11Slice
from df11_jax._compress import compress_params
from df11_jax._compress_tensor import compress
from df11_jax._decode import EXPORT_SAFETY_CHECKS, after, decompress, decompress_params
from df11_jax._flax import register_with_flax as _register_with_flax
from df11_jax._placement import device_put
from df11_jax._product import dot
from df11_jax._scan import scan_blocks
from df11_jax._size_report import SizeReport, size_report
from df11_jax._stack import stack
from df11_jax._take import take

_register_with_flax()

__version__ = _version("df11_jax")

__all__ = [
    "EXPORT_SAFETY_CHECKS",
    "DF11Array",
    "DF11Slice",
    "SizeReport",
    "after",
    "compress",
    "compress_params",
    "decompress",
    "decompress_params",
    "device_put",
    "dot",
    "scan_blocks",
    "size_report",
    "stack",
    "take",
]
