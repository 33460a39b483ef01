"""The compiled decoders: which are there, and their registration with XLA."""

import functools
import importlib
import warnings

import jax

from df11_jax import _cuda

DECODE_TARGET = "df11_decode"
PUBLISHED_DECODE_TARGET = "df11_published_decode"
PRODUCT_TARGET = "df11_product"

# The kernel of the product copies in bulk, which earlier GPUs cannot.
_LEAST_PRODUCT_CAPABILITY = (9, 0)

# Platform, as jax.lax.platform_dependent names it: (module with the handlers, name for XLA).
_LIBRARIES = {
    "cpu": ("df11_jax._cpu_library", "cpu"),
    "cuda": (_cuda.MODULE, "CUDA"),
}
_registered: dict[str, frozenset[str]] = {}  # the targets of each platform


@functools.cache
def register(platform: str) -> _cuda.Obstacle | None:
    """Loads a platform's library and registers its handlers, once.

    Args:
        platform: "cpu" or "cuda".

    Returns:
        None, or why nothing that is compiled can decode on that platform here. It is then as if
        there were no library, for programs fall back only while they are lowered.
    """
    obstacle = _find_obstacle(platform)
    if obstacle is not None:
        return obstacle
    module, xla_platform = _LIBRARIES[platform]
    handlers = importlib.import_module(module).handlers()
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform=xla_platform)
    _registered[platform] = frozenset(handlers)
    return None


def platforms(target: str = DECODE_TARGET) -> tuple[str, ...]:
    """The platforms with a compiled decoder; it is registered when this returns."""
    return tuple(
        platform
        for platform in _LIBRARIES
        if register(platform) is None and target in _registered[platform]
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
        obstacle = register(platform)
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


def _find_obstacle(platform: str) -> _cuda.Obstacle | None:
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
