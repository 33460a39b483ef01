"""Programs for a GPU, of which there need not be one here."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax import export

import df11_jax
from df11_jax import _ffi

needs_product = pytest.mark.skipif(
    not _ffi.platforms(_ffi.PRODUCT_TARGET),
    reason="needs the CUDA library: install df11_jax with nvcc on PATH",
)


def count_calls(function: Callable[..., Any], *args: Any) -> list[int]:
    """How many fused products, and calls of the decoder, are in a program for a GPU."""
    exported = export.export(
        jax.jit(function), platforms=["cuda"], disabled_checks=df11_jax.EXPORT_SAFETY_CHECKS
    )(*args)
    text = exported.mlir_module()
    return [text.count(f"@{target}(") for target in (_ffi.PRODUCT_TARGET, _ffi.DECODE_TARGET)]
