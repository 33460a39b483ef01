"""Products that do not decompress, as where the CUDA library is."""

import pytest

import df11_jax
from df11_jax import _module_products


@pytest.fixture
def fused_products(monkeypatch):
    """Has products be `dot`s, which decompresses first on a CPU; lists their shapes."""
    shapes = []

    def dot(x, a, **options):
        y = df11_jax.dot(x, a, **options)
        shapes.append((x.shape, y.shape))
        return y

    monkeypatch.setattr(_module_products, "can_fuse", lambda stack, rows: rows <= 32)
    monkeypatch.setattr(_module_products, "dot", dot)
    return shapes
