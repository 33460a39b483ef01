"""Checkpoints of compressed parameters with Orbax, for both of its APIs.

`DF11Save` and `DF11Restore` take the place of `StandardSave` and `StandardRestore`; Orbax's v1 API
needs no arguments for a pytree that contains a `DF11Array`::

    manager.save(step, args=ocp.args.Composite(params=DF11Save(params), opt_state=...))
    manager.restore(step, args=ocp.args.Composite(params=DF11Restore(), opt_state=...))

    v1.save_checkpointables(path, {"params": params})
    v1.load_checkpointables(path)["params"]

docs/orbax.md in the repository explains more, and specifies what is stored. The module `items` is
for the other packages of df11_jax, and not public.
"""

import importlib.util

# Orbax's packages share a namespace: another of them may be there alone.
if not all(importlib.util.find_spec(name) for name in ("orbax", "orbax.checkpoint")):
    raise ImportError(
        'df11_jax.orbax needs orbax-checkpoint. Install with: pip install "df11_jax[orbax]"'
    )

from df11_jax.orbax._args import DF11Restore, DF11Save
from df11_jax.orbax._v0 import DF11CheckpointHandler
from df11_jax.orbax._v1 import DF11Handler

__all__ = ["DF11CheckpointHandler", "DF11Handler", "DF11Restore", "DF11Save"]
