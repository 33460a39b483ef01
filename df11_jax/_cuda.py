"""The requirements of the CUDA decoder, and whether this machine meets them."""

import ctypes
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

MODULE = "df11_jax._cuda_library"

# CUDA major: the oldest driver that runs what is compiled for it, according to NVIDIA's table of
# minor version compatibility (for Linux).
_OLDEST_DRIVER = {12: "525", 13: "580"}

Version = tuple[int, int]  # major and minor


class Build(NamedTuple):
    """The targets for which a CUDA library was compiled.

    Attributes:
        cuda: the version of the toolkit, and so of the runtime in the library.
        architectures: the compute capabilities with machine code, in ascending order; the last
            has PTX as well.
    """

    cuda: Version
    architectures: tuple[Version, ...]

    @property
    def driver(self) -> str:
        """The oldest driver that runs it, in words."""
        major = self.cuda[0]
        if major in _OLDEST_DRIVER:
            return f"NVIDIA driver {_OLDEST_DRIVER[major]} or newer"
        return f"an NVIDIA driver for CUDA {major}.0 or newer"

    def runs_on(self, capability: Version) -> bool:
        """Whether a GPU of this compute capability has code to run."""
        major, minor = capability
        # Machine code runs on GPUs that have the same major number and are not older.
        machine_code = any(a == major and b <= minor for a, b in self.architectures)
        # Some kernels are compiled from 8.0 or 9.0 on, and launched there.
        newest = self.architectures[-1]
        has_all = all(newest >= least or capability < least for least in ((8, 0), (9, 0)))
        return machine_code or (capability >= newest and has_all)

    def __str__(self) -> str:
        architectures = ", ".join(map(version_name, self.architectures))
        return (
            f"built for CUDA {version_name(self.cuda)} and compute capability {architectures}; "
            f"needs {self.driver}"
        )


class Obstacle(NamedTuple):
    """The reason why a platform has no compiled decoder, and a remedy."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return self.reason


def is_in_build() -> bool:
    """Whether this build has a CUDA library, even one that does not load."""
    return importlib.util.find_spec(MODULE) is not None


def load() -> Build | Obstacle:
    """Loads the library, which also loads where there is no driver."""
    if not is_in_build():
        return Obstacle(
            "this build of df11_jax has no CUDA decoder",
            "Put nvcc 12.8 or newer on the PATH, and install df11_jax from its source with "
            "pip install -C cmake.define.DF11_CUDA=ON",
        )
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        return Obstacle(
            f"the CUDA library of df11_jax does not load: {error}",
            "Install df11_jax again; if that does not help, build it from its source on this "
            "machine",
        )
    return Build(
        cuda=divmod(module.cuda_version // 10, 100),
        architectures=tuple(divmod(number // 10, 10) for number in module.architectures),
    )


def find_obstacle(
    build: Build, driver: Version | None, gpus: Mapping[str, Version]
) -> Obstacle | None:
    """Finds out why the GPUs of a machine cannot run a library.

    Args:
        build: the targets of the library.
        driver: the CUDA version that the machine's driver supports; None if that is not known.
        gpus: the name and compute capability of each GPU. Without any, programs are compiled for
            another machine, of which nothing is known.

    Returns:
        The obstacle; None if there is none.
    """
    if not gpus:
        return None
    if driver is not None and driver[0] < build.cuda[0]:
        return Obstacle(
            f"the CUDA decoder is {build}, and the driver here is for CUDA {version_name(driver)}",
            f"Install {build.driver}; or put an nvcc of CUDA {driver[0]} (12.8 or newer) on the "
            "PATH, and install df11_jax from its source",
        )
    for name, capability in gpus.items():
        if not build.runs_on(capability):
            return Obstacle(
                f"the CUDA decoder is {build}, and {name} has compute capability "
                f"{version_name(capability)}",
                _capability_remedy(build.architectures, capability),
            )
    return None


def local_gpus() -> dict[str, Version]:
    """The names and compute capabilities of the GPUs of JAX's CUDA backend in this process."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # there is no such backend
        return {}
    return {device.device_kind: _parse(device.compute_capability) for device in devices}


def driver_version() -> Version | None:
    """The newest CUDA version that the machine's driver supports; None if there is no driver."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int()
    if function(ctypes.byref(number)) != 0:
        return None
    return divmod(number.value // 10, 100)


def version_name(version: Version) -> str:
    """A version as people write it: 13.0."""
    return "{}.{}".format(*version)


def _capability_remedy(architectures: Sequence[Version], capability: Version) -> str:
    if capability < architectures[0]:
        return (
            "None: the kernel needs what newer GPUs have. Weights are decompressed by plain XLA "
            "operations"
        )
    major, minor = capability
    return (
        "Install df11_jax from its source with pip install -C "
        f"cmake.define.DF11_CUDA_ARCHITECTURES={major}{minor}"
    )


def _parse(capability: str) -> Version:
    major, minor = capability.split(".")
    return int(major), int(minor)
