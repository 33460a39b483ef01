import tracemalloc

import pytest

from df11_jax._brief import brief


@pytest.mark.parametrize("value", [None, 1, "x", [1, 2], {"a": [1]}, (2**63,), b"ab"])
def test_small_values_are_whole(value):
    assert brief(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        [["x" * 1000] * 1000] * 10_000,
        {str(i): list(range(1000)) for i in range(1000)},
        {"a": {"b": {"c": {"d": ["x" * 10_000_000]}}}},
        10**4000,
    ],
)
def test_large_values_are_never_written_out(value):
    tracemalloc.start()
    try:
        text = brief(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(text) <= 80
    assert peak < 200_000
