"""The device that is measured: its name, its memory, its clocks."""

import os
import subprocess
import threading
from typing import Any

import jax

from df11_jax import _ffi, _host
from df11_jax._host_codec import available_threads
from df11_jax.bench.programs import Program

# Field of nvidia-smi: key in the JSON.
_QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.max.mem": "max_memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}


def describe_device() -> dict[str, Any]:
    """The name and platform of the default device, and its decoder."""
    device, platform = jax.devices()[0], jax.default_backend()
    compiled = {"gpu": "cuda"}.get(platform, platform) in _ffi.platforms()
    found: dict[str, Any] = {
        "name": _host.processor_name() if platform == "cpu" else device.device_kind,
        "platform": platform,
        "decoder": "compiled" if compiled else "plain XLA operations",
    }
    if platform == "cpu":
        found["threads"] = available_threads()
    for attribute in ("compute_capability", "core_count"):
        if hasattr(device, attribute):
            found[attribute] = getattr(device, attribute)
    return found


def free_bytes() -> int | None:
    """The bytes of the default device that are free; None if nothing tells them."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return free_host_bytes() if jax.default_backend() == "cpu" else None


def free_host_bytes() -> int | None:
    """The bytes of the host's memory that are free; None if nothing tells them."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None


def read_clocks() -> dict[str, Any] | None:
    """Clocks, power and temperature of the default device; None if nvidia-smi does not tell."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    number = str(device.local_hardware_id)
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        number = visible.split(",")[device.local_hardware_id]
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", f"--id={number}"]
    command += ["--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in result.stdout.strip().split(",")]
    return {key: _number(value) for key, value in zip(_QUERY.values(), values, strict=False)}


def read_clocks_under(program: Program) -> dict[str, Any] | None:
    """Clocks, power and temperature while the device is busy with a program."""
    if jax.default_backend() != "gpu":
        return None
    clocks: list[dict[str, Any] | None] = []
    reader = threading.Thread(target=lambda: clocks.append(read_clocks()))
    for _ in range(20):  # busy before the first look
        jax.block_until_ready(program.run())
    reader.start()
    while reader.is_alive():
        jax.block_until_ready(program.run())
    return clocks[0] if clocks else None


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
