"""Checkpoints of compressed parameters with Orbax, for both of its APIs.

`DF11Save` and `DF11Restore` take the place of `StandardSave` and `StandardRestore`; v1 needs no
arguments for a pytree with a `DF11Array` in it::

    manager.save(step, args=ocp.args.Composite(params=DF11Save(params), opt_state=...))
    manager.restore(step, args=ocp.args.Composite(params=DF11Restore(), opt_state=...))

    v1.save_checkpointables(path, {"params": params})
    v1.load_checkpointables(path)["params"]

docs/orbax.md in the repository tells more, and specifies what is stored.
"""

import importlib.util

if importlib.util.find_spec("orbax") is None:
    raise ImportError(
        'df11_jax.orbax needs orbax-checkpoint. Install with: pip install "df11_jax[orbax]"'
    )

from df11_jax.orbax._v0 import DF11CheckpointHandler, DF11Restore, DF11Save
from df11_jax.orbax._v1 import DF11Handler

__all__ = ["DF11CheckpointHandler", "DF11Handler", "DF11Restore", "DF11Save"]
