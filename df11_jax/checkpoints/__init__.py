"""Checkpoints on disk: read tensor by tensor in any format, and written in the native one.

`load` and `save` are for pytrees. `open_checkpoint` opens a checkpoint without loading it. The
modules are for other packages of df11_jax, and not public.
"""

from df11_jax._files.source import Source, TensorInfo, TensorSource
from df11_jax.checkpoints._load import load
from df11_jax.checkpoints._open import open_checkpoint
from df11_jax.checkpoints._save import save

__all__ = ["Source", "TensorInfo", "TensorSource", "load", "open_checkpoint", "save"]
