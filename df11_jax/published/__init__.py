"""Published DFloat11 checkpoints: reading, decoding, transcoding and writing.

`Checkpoint` opens a checkpoint from the model hubs: a directory or a file. Its `read` returns one
tensor; its `read_unit` returns a unit, still compressed, which `decompress` decodes, also inside of
jit. `df11_jax.checkpoints.load` loads the whole model in the native layout. `write` makes a
checkpoint that DFloat11's own library can use; `encode_unit` makes one unit of it. The modules
are for other packages of df11_jax, and not public.
"""

from df11_jax.published._checkpoint import Checkpoint, UnitInfo
from df11_jax.published._encode import encode_unit
from df11_jax.published._patterns import default_pattern_dict
from df11_jax.published._unit import PublishedUnit, decompress
from df11_jax.published._write import write

__all__ = [
    "Checkpoint",
    "PublishedUnit",
    "UnitInfo",
    "decompress",
    "default_pattern_dict",
    "encode_unit",
    "write",
]
