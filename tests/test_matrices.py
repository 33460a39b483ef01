"""How leaves of a tree are compressed as matrices."""

import jax
import pytest
from payloads import assert_same_bits, random_weights

import df11_jax


def test_matrices_of_a_tree():
    plain = {"q": random_weights((3, 128, 2, 64)), "o": random_weights((3, 2, 64, 128))}
    plain |= {"table": random_weights((256, 128)), "both": random_weights((3, 2, 64, 128))}
    options = {"stacked": "^[qo]|both", "row_axes": {"q": 1, "both": 2, "^b": 1}}
    plain["heads"] = random_weights((2, 128, 64))
    options |= {"batch_axes": {"heads": 1}, "along_columns": "table"}
    small = df11_jax.compress_params(plain, **options)
    names = ("batch_axes", "row_axes", "along_columns")
    layouts = {key: tuple(getattr(a.layout, name) for name in names) for key, a in small.items()}
    assert layouts == {
        "q": (0, 1, False),
        "o": (0, 2, False),
        "both": (0, 2, False),
        "table": (0, 1, True),
        "heads": (1, 1, False),
    }
    jax.tree.map(assert_same_bits, df11_jax.decompress_params(small), plain)


def test_a_tied_leaf_that_is_two_matrices():
    weights = random_weights((128, 2, 64))
    small = df11_jax.compress_params({"a": weights, "b": weights}, row_axes={"a": 1})
    assert (small["a"].layout.row_axes, small["b"].layout.row_axes) == (1, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_axes": {"a": 4}}, ValueError, r"^a: .* \(128, 2, 64\) .* 4 row axes"),
        ({"row_axes": {"a": 1.5}}, TypeError, "float"),
        ({"batch_axes": {"a": 4}}, ValueError, r"^a: .* 4 batch axes"),
        ({"row_axes": {"(": 1}}, ValueError, "row_axes: '\\(' is not a regular expression"),
        ({"row_axes": 1}, TypeError, "row_axes: expected a dict of .*, got 1"),
        ({"along_columns": True}, TypeError, "along_columns: expected a regular expression"),
        ({"row_axes": {"a": 1}, "like": {}}, ValueError, "leave out .* row_axes"),
    ],
)
def test_matrices_that_are_none(options, error, message):
    plain = {"a": random_weights((128, 2, 64))}
    if "like" in options:
        options = options | {"like": df11_jax.compress_params(plain)}
    with pytest.raises(error, match=message):
        df11_jax.compress_params(plain, **options)


def test_patterns_that_are_found_nowhere():
    plain = {"a": random_weights((128, 128))}
    with pytest.warns(UserWarning, match=r"row_axes='query' is found in no path"):
        df11_jax.compress_params(plain, row_axes={"query": 1})
    with pytest.warns(UserWarning, match=r"along_columns='embed' is found in no path"):
        df11_jax.compress_params(plain, along_columns="embed")
