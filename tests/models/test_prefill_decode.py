"""`prefill` and `decode` as one's own loop calls them: what they take, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import GREEDY, NONE, load, read

from df11_jax import models


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"length": 8}, ValueError, "prompts have 9 tokens, but the cache has room for 8"),
        ({"prompts": [[1, 2], [3, 4]]}, TypeError, r"prompts are list, expected an array \[batch"),
        ({"prompts": np.ones((2, 9))}, TypeError, "prompts are float.*, expected .* of integers"),
        ({"prompts": np.ones(9, np.int32)}, ValueError, r"prompts have the shape \(9,\), expected"),
        ({"prompts": np.ones((2, 0), np.int32)}, ValueError, "at least one of each"),
        (
            {"lengths": np.array([9])},
            ValueError,
            r"lengths have the shape .*, expected \(2,\): one for",
        ),
        (
            {"lengths": np.int32(9)},
            ValueError,
            r"lengths have the shape .*, expected \(2,\): one for",
        ),
        (
            {"keys": jax.random.key(0)},
            ValueError,
            r"keys have the shape \(\), expected \(2,\): one for",
        ),
    ],
)
def test_rows_that_do_not_fit_each_other(changed, error, message):
    params, config = load("llama")
    arrays = {
        "prompts": np.ones((2, 9), np.int32),
        "lengths": np.array([9, 8]),
        "keys": jax.random.split(jax.random.key(0), 2),
        "length": 16,
    }
    args = arrays | changed
    with pytest.raises(error, match=message):
        models.prefill(params, sampling=GREEDY, stop=NONE, config=config, **args)


def test_decode_takes_tokens_that_the_caller_chose_as_another_integer():
    params, config = load("llama")
    keys = jax.random.split(jax.random.key(0), 3)
    state = read(params, config)
    with pytest.raises(ValueError, match="room is 0, expected at least 1 token"):
        models.decode(params, state, 2, GREEDY, keys, NONE, 0, config)
    _, expected = models.decode(params, read(params, config), 2, GREEDY, keys, NONE, 2, config)
    state = state._replace(tokens=state.tokens.astype(jnp.int16))
    _, tokens = models.decode(params, state, 2, GREEDY, keys, NONE, 2, config)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
    ("family", "length", "room", "expected"),
    [
        ("llama", 6, 12, 4),
        ("llama", 64, 5, 5),
        # Sliding layers only: with a whole window there is always room.
        ("mistral", 6, 12, 4),
        ("mistral", 8, 12, 12),
    ],
)
@pytest.mark.slow
def test_no_token_where_there_is_no_room(family, length, room, expected):
    params, config = load(family)
    keys, prompts = jax.random.split(jax.random.key(0), 1), np.ones((1, 2), np.int32)

    def decode(length, room):
        args = prompts, np.array([2], np.int32), GREEDY, keys, NONE
        state = models.prefill(params, *args, length, config)
        return np.asarray(models.decode(params, state, 12, GREEDY, keys, NONE, room, config)[1])

    tokens = decode(length, room)
    np.testing.assert_array_equal(tokens[:, :expected], decode(64, 12)[:, :expected])
    assert (tokens[:, expected:] == models.NO_TOKEN).all()
