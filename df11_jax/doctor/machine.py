"""The backends, devices and decoders of this machine, and the CUDA library."""

import dataclasses
import os
import subprocess
from platform import machine

import jax
import jax.extend

from df11_jax import _cuda, _ffi, _host_codec
from df11_jax._host import processor_name
from df11_jax._host_arrays import start_backends
from df11_jax.doctor.extras import installed_version
from df11_jax.doctor.self_test import simd_name

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend of JAX in this process.

    Attributes:
        platform: its name: "cpu", "cuda", "tpu", ...
        devices: the kind of each device.
        is_default: whether programs run there unless told otherwise.
        decoder: the decoder that is used there.
        why: the reason for that decoder.
        obstacle: the reason why it is not a compiled one, if there is one for the platform.
    """

    platform: str
    devices: list[str]
    is_default: bool
    decoder: str
    why: str
    obstacle: _cuda.Obstacle | None


@dataclasses.dataclass(frozen=True)
class Cuda:
    """The CUDA library of this build of df11_jax, and NVIDIA's driver on this machine.

    Attributes:
        in_build: whether there is a library.
        loads: whether the library loads.
        error: the reason why it does not load; None otherwise.
        built_for: the CUDA version that the library was built for.
        compute_capabilities: the compute capabilities that the library has machine code for; newer
            ones than the last will do, too.
        needs: the driver that the library needs.
        driver: the version of the driver, from nvidia-smi; None if that is not known.
        driver_cuda: the newest CUDA version that it supports; None without a driver.
        jax_plugins: JAX's own packages for CUDA.
    """

    in_build: bool
    loads: bool
    error: str | None
    built_for: str | None
    compute_capabilities: list[str]
    needs: str | None
    driver: str | None
    driver_cuda: str | None
    jax_plugins: dict[str, str]


def list_backends() -> list[Backend]:
    """Starts JAX's backends, and says what decodes on each.

    Raises:
        RuntimeError: JAX cannot start what it was told to use.
    """
    start_backends()
    default = jax.local_devices()[0].platform
    backends = []
    for platform, client in jax.extend.backend.backends().items():
        devices = client.local_devices()
        kinds = [processor_name() if platform == "cpu" else d.device_kind for d in devices]
        is_default = any(device.platform == default for device in devices)
        backends.append(Backend(platform, kinds, is_default, *_decoder_of(platform)))
    return backends


def local_devices(platform: str) -> list[jax.Device]:
    """One device of each kind that a backend has in this process."""
    devices = jax.local_devices(backend=platform)
    return list({device.device_kind: device for device in reversed(devices)}.values())


def _decoder_of(platform: str) -> tuple[str, str, _cuda.Obstacle | None]:
    """The decoder of a backend, the reason for it, and the obstacle to a compiled one."""
    plain = "plain XLA operations"
    if platform not in ("cpu", "cuda"):
        return plain, "there is no compiled decoder for this platform", None
    obstacle = _ffi.find_obstacle(platform)
    if obstacle is not None:
        return plain, obstacle.reason, obstacle
    if platform == "cuda":
        return "compiled, CUDA", "the CUDA library loads, and driver and GPU can run it", None
    levels = [simd_name(level) for level in _host_codec.cpu_library().simd_levels()]
    why = f"the best that this processor has of {', '.join(levels)}"
    if machine() not in ("x86_64", "AMD64"):
        why = "the only one for processors of this kind"
    elif len(levels) == 1:
        why = "this processor has neither AVX-512 nor AVX2, which would be faster"
    return f"compiled, {levels[-1]}", why, None


def describe_cuda() -> Cuda:
    """Looks for the CUDA library, for NVIDIA's driver, and for JAX's own packages for CUDA."""
    found = _cuda.load()
    build = found if isinstance(found, _cuda.Build) else None
    driver = _cuda.driver_version()
    plugins = {name: installed_version(name) for name in _PLUGINS}
    return Cuda(
        in_build=_cuda.is_in_build(),
        loads=build is not None,
        error=None if build or not _cuda.is_in_build() else str(found),
        built_for=build and _cuda.version_name(build.cuda),
        compute_capabilities=[_cuda.version_name(a) for a in build.architectures] if build else [],
        needs=build and build.driver,
        driver=_driver_from_smi(),
        driver_cuda=driver and _cuda.version_name(driver),
        jax_plugins={name: version for name, version in plugins.items() if version},
    )


def _driver_from_smi() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split("\n")[0].strip() or None


def environment() -> dict[str, str]:
    """The variables that say which devices JAX may use."""
    names = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
    return {name: os.environ[name] for name in names if name in os.environ}
