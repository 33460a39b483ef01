"""The compiled decoders: their registration with XLA, and which can be used here."""

import functools
import importlib
import warnings

import jax

from df11_jax import _cuda

DECODE_TARGET = "df11_decode"
PUBLISHED_DECODE_TARGET = "df11_published_decode"
PRODUCT_TARGET = "df11_product"

# Earlier GPUs have no tensor cores for bfloat16, with which the product's kernel multiplies.
_LEAST_PRODUCT_CAPABILITY = (8, 0)

# Platform, as jax.lax.platform_dependent names it: (module with the handlers, name for XLA).
_LIBRARIES = {
    "cpu": ("df11_jax._cpu_library", "cpu"),
    "cuda": (_cuda.MODULE, "CUDA"),
}


def _register(platform: str) -> frozenset[str]:
    """Registers the handlers in a platform's library, if it loads; returns their targets."""
    module, xla_platform = _LIBRARIES[platform]
    try:
        handlers = importlib.import_module(module).handlers()
    except ImportError:
        return frozenset()
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform=xla_platform)
    return frozenset(handlers)


# On import, and whatever devices there are: a process that runs an exported program may trace
# nothing that decodes. This starts no backend.
_TARGETS = {platform: _register(platform) for platform in _LIBRARIES}


@functools.cache
def find_obstacle(platform: str) -> _cuda.Obstacle | None:
    """Finds out why nothing that is compiled can decode on a platform here.

    Args:
        platform: "cpu" or "cuda".

    Returns:
        The obstacle; None if there is none. With one, programs do not call the library, for they
        fall back only while they are lowered.
    """
    if platform == "cuda":
        build = _cuda.load()
        if isinstance(build, _cuda.Obstacle):
            return build
        return _cuda.find_obstacle(build, _cuda.driver_version(), _cuda.local_gpus())
    try:
        importlib.import_module(_LIBRARIES[platform][0])
    except ImportError as error:
        return _cuda.Obstacle(
            f"its library does not load ({error})",
            "Install df11_jax, for its source tree alone is not compiled: pip install .",
        )
    return None


def platforms(target: str = DECODE_TARGET) -> tuple[str, ...]:
    """The platforms on which programs that are lowered here call the compiled decoder."""
    return tuple(
        platform
        for platform, targets in _TARGETS.items()
        if target in targets and find_obstacle(platform) is None
    )


def product_platforms() -> tuple[str, ...]:
    """The platforms on which products are fused, if the GPUs that are here can."""
    capabilities = _cuda.local_gpus().values()
    if any(capability < _LEAST_PRODUCT_CAPABILITY for capability in capabilities):
        return ()
    return platforms(PRODUCT_TARGET)


@functools.cache
def warn_if_slow() -> None:
    """Warns, once, if devices here could have a compiled decoder, and it cannot be used.

    Such devices use the decoder in plain XLA operations instead: right, but much slower.
    """
    for platform in _LIBRARIES:
        obstacle = find_obstacle(platform)
        if obstacle is not None and _has_devices(platform):
            warnings.warn(
                f"On {platform.upper()}, df11_jax decompresses weights by plain XLA operations, "
                f"which is much slower than its compiled decoder: {obstacle.reason}. "
                "`df11-jax doctor` says what to do about it.",
                RuntimeWarning,
                stacklevel=2,
            )


def _has_devices(platform: str) -> bool:
    return platform == "cpu" or bool(_cuda.local_gpus())
