"""Checkpoints on disk: any format is read tensor by tensor; the native one is written, too.

`load` and `save` are for pytrees. `open_checkpoint` gives what the command line works with.
"""

from df11_jax._files.source import Source, TensorInfo, TensorSource
from df11_jax.checkpoints._open import open_checkpoint
from df11_jax.checkpoints._pytree import load, save

__all__ = ["Source", "TensorInfo", "TensorSource", "load", "open_checkpoint", "save"]
