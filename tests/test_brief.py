import tracemalloc

import pytest

from df11_jax._brief import brief, printable


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


@pytest.mark.parametrize("text", ["", "model.layers.0", "[/x]", "é 漢 🧑\u200d🚀 \u200f", "a\\n"])
def test_what_can_be_printed_stays(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nError: b\r\t\x7f", r"a\nError: b\r\t\x7f"),
        ("\x9b2J\u2028", r"\x9b2J\u2028"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text, keep=text) == text
