"""Settings that XLA reads once, before anything imports jax."""

import os

_FLAGS = (
    # Otherwise the CPU scheduler runs independent decodes at once, and memory tests mean nothing.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_force_host_platform_device_count=2",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS)).strip()
