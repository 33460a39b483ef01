"""Checkpoints on disk: any format is read tensor by tensor; the native one is written, too.

`load` and `save` are for pytrees. `open_checkpoint` gives what the command line works with.
"""

from df11_jax.checkpoints._open import open_checkpoint
from df11_jax.checkpoints._pytree import load, save
from df11_jax.checkpoints._source import Source, TensorInfo, TensorSource

__all__ = ["Source", "TensorInfo", "TensorSource", "load", "open_checkpoint", "save"]
