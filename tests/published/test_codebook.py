"""The code of a unit: the reference's, and one that its tables decode."""

import itertools
import json
import pathlib

import numpy as np
import published_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from df11_jax import _cpu_library
from df11_jax.published import _codebook

FIXTURES = json.loads((pathlib.Path(__file__).parent / "fixtures" / "encoder.json").read_text())
CODES = published_cases.counts()


def as_array(counts):
    array = np.zeros(256, np.int64)
    for exponent, count in counts.items():
        array[exponent] = count
    return array


def look_up(luts, code):
    """The exponent that the tables have for a string of 0 and 1, followed by anything."""
    row = 0
    for at in range(0, 32, 8):
        entry = int(luts[row, int(code[at : at + 8].ljust(8, "0"), 2)])
        if entry < _codebook.FIRST_POINTER:
            return entry
        row = 256 - entry
    raise AssertionError("no exponent in 32 bits")


@pytest.mark.parametrize("name", CODES)
def test_tables_are_the_references(name):
    counts = as_array(CODES[name])
    try:
        luts = _codebook.build_codebook(counts).luts
    except ValueError as error:
        # Its tables are written, but more of them than can be pointed to.
        assert "look-up tables, and only 17" in str(error)
        assert name.startswith("drawn")
    else:
        assert published_cases.digest(luts) == FIXTURES["codes"][name]


def test_some_are_refused_and_some_need_shorter_codes():
    refused = 0
    for counts in CODES.values():
        try:
            _codebook.build_codebook(as_array(counts))
        except ValueError:
            refused += 1
    assert 0 < refused < 6
    long_code = as_array(CODES["fibonacci 70"])
    book = _codebook.build_codebook(long_code)
    assert max(book.lengths.max(), book.end.length) == _codebook.MAX_CODE_BITS
    used = np.flatnonzero(long_code)
    leaves = _codebook._huffman_code(used, long_code[used])
    assert max(leaf.length for leaf in leaves) == 70


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 239), st.one_of(st.integers(1, 5), st.integers(1, 2**40)), min_size=1
    )
)
def test_code_is_complete_and_decodable(counts):
    try:
        book = _codebook.build_codebook(as_array(counts))
    except ValueError as error:
        assert "look-up tables" in str(error)
        return
    assert set(np.flatnonzero(book.lengths)) == set(counts)
    codes = {e: f"{book.bits[e]:0{book.lengths[e]}b}" for e in counts}
    codes["end"] = f"{book.end.bits:0{book.end.length}b}"
    assert sum(2.0 ** -len(code) for code in codes.values()) == 1
    ordered = sorted(codes.values())
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))
    for exponent in counts:
        for following in ("0" * 32, "1" * 32, "01" * 16):
            assert look_up(book.luts, codes[exponent] + following) == exponent
    np.testing.assert_array_equal(book.luts[-1], book.lengths)
    # A decoder that runs into zeros after the end finds a code there, and gets on.
    assert book.lengths[look_up(book.luts, "0" * 32)] > 0
    assert check_tables(book.luts) == ""


def check_tables(luts):
    one = np.zeros(1, np.uint8)
    positions = np.array([0, 1], np.uint32)
    return _cpu_library.published_check(one, one, luts, positions, np.zeros(320, np.uint8))


@pytest.mark.parametrize("name", ["fibonacci 40", "drawn 8", "equal", "one frequent"])
def test_any_other_entry_is_found(name):
    """No entry can be changed unnoticed."""
    luts = _codebook.build_codebook(as_array(CODES[name])).luts
    rng = np.random.default_rng(0)
    accepted = []
    for _ in range(300):
        bad = luts.copy()
        row, entry = rng.integers(luts.shape[0]), rng.integers(256)
        bad[row, entry] = rng.integers(256)
        if (bad != luts).any() and check_tables(bad) == "":
            accepted.append((row, entry))
    assert accepted == []


@pytest.mark.parametrize("counts", [{}, {240: 1}, {3: 1, 255: 7}])
def test_what_has_no_code(counts):
    with pytest.raises(ValueError, match="a code needs exponents, all below 240, got"):
        _codebook.build_codebook(as_array(counts))
