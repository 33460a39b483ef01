"""Published DFloat11 checkpoints: read, decoded, transcoded, written.

`Checkpoint` opens what is on the model hubs: a directory or a file. Its `read` gives one tensor,
its `read_unit` a unit as it is, which `decompress` decodes, also inside of jit. The whole model in
the native layout is what `df11_jax.checkpoints.load` gives. `write` makes a checkpoint that
DFloat11's own library can use; each of its units is what `encode_unit` gives.
"""

from df11_jax.published._checkpoint import Checkpoint, UnitInfo
from df11_jax.published._patterns import default_pattern_dict
from df11_jax.published._unit import PublishedUnit, decompress, encode_unit
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
