"""The compiled decoders: which are there, and their registration with XLA."""

import functools
import importlib
import warnings

import jax
from jax.extend.backend import backends

DECODE_TARGET = "df11_decode"
PUBLISHED_DECODE_TARGET = "df11_published_decode"

# Platform, as jax.lax.platform_dependent names it: (module with the handlers, name for XLA).
_LIBRARIES = {
    "cpu": ("df11_jax._native", "cpu"),
    "cuda": ("df11_jax._native_cuda", "CUDA"),
}
_registered: dict[str, frozenset[str]] = {}  # the targets of each platform


@functools.cache
def register(platform: str) -> str | None:
    """Loads a platform's library and registers its handlers, once.

    Args:
        platform: "cpu" or "cuda".

    Returns:
        None, or why there is no library for that platform.
    """
    module, xla_platform = _LIBRARIES[platform]
    try:
        handlers = importlib.import_module(module).handlers()
    except ImportError as error:
        return str(error)
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


@functools.cache
def warn_if_slow() -> None:
    """Warns, once, if a device could have a compiled decoder but its library is missing.

    Such a device uses the decoder in plain XLA operations instead: right, but much slower. It need
    not be the default device: weights may be on a GPU beside a TPU.
    """
    for platform in filter(backends().__contains__, _LIBRARIES):
        reason = register(platform)
        if reason is not None:
            warnings.warn(
                f"df11_jax has no compiled decoder for {platform}, so weights are decompressed "
                f"there by plain XLA operations, which is much slower. Install df11_jax with its "
                f"{platform} library ({_LIBRARIES[platform][0]}: {reason}).",
                RuntimeWarning,
                stacklevel=2,
            )
