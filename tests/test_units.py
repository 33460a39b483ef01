import pytest

from df11_jax._units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("80G", 80 * 2**30),
        ("1.5T", 3 * 2**39),
        (".5gib", 2**29),
        ("512MiB", 2**29),
        ("1000", 1000),
        ("7B", 7),
    ],
)
def test_reads_a_number_of_bytes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**29, "512 MiB"), (5 * 2**40, "5120 GiB")],
)
def test_writes_a_number_of_bytes(nbytes, text):
    assert format_bytes(nbytes) == text
