"""Settings that XLA reads once, before anything imports jax, and those of other processes."""

import importlib.util
import os
import pathlib

_FLAGS = (
    # Otherwise the CPU scheduler runs independent decodes at once, and memory tests mean nothing.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_force_host_platform_device_count=4",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS)).strip()

# Tests that start `python -P -c` get the package that is tested here, installed or in the tree.
_package = importlib.util.find_spec("df11_jax")
assert _package and _package.origin, "df11_jax is not installed: pip install ."
_folders = (str(pathlib.Path(_package.origin).parents[1]), os.environ.get("PYTHONPATH", ""))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _folders))
