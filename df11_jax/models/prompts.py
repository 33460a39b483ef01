"""Prompts: texts as tokens, which prompts a model can continue, and how long their caches are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from df11_jax._brief import brief
from df11_jax.models._config import Config

if TYPE_CHECKING:
    import tokenizers

# Prompts and caches are padded to a multiple of this length, so that similar ones share a program.
BUCKET = 64


def encode(tokenizer: "tokenizers.Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, with special ones in front as the tokenizer puts them there.

    Raises:
        TypeError: `prompts` is a single text, or one of them is none.
        ValueError: a text is empty, no Unicode text, or one that the tokenizer cannot encode.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a single text, expected a list of texts")
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{i}]: expected a text, got {brief(prompt)}")
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty: expected some text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts[{i}] is no Unicode text: {error}") from None
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    except Exception as error:  # such as an unknown token that is not in the vocabulary
        raise ValueError(
            f"the model's tokenizer.json cannot encode the prompts ({error})"
        ) from None


def cache_length(prompt: int, tokens: int) -> int:
    """The length that `generate` gives the cache.

    Args:
        prompt: the length of the longest prompt.
        tokens: the number of tokens to generate.
    """
    return _round_up(_round_up(prompt) + tokens - 1)  # the last token is chosen, but not read


def padded_length(prompt: int, tokens: int, length: int) -> int:
    """The length that `generate` pads prompts to; it leaves room for tokens in the cache.

    Args:
        prompt: the length of the longest prompt.
        tokens: the number of tokens to generate.
        length: the length of the cache.
    """
    return min(_round_up(prompt), length - (tokens - 1))


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "batch length"]:
    """Prompts as rows of an array, padded with zeros at their beginnings."""
    padded = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return padded


def check_prompts(
    prompts: Sequence[Sequence[int]], config: Config, tokens: int, length: int | None = None
) -> int:
    """Checks prompts, and returns the length of the cache that `generate` makes for them.

    Args:
        prompts: the tokens of each prompt.
        config: the configuration of the transformer.
        tokens: the number of tokens to generate for each.
        length: the length of the cache; None for what is needed, see `cache_length`.

    Raises:
        ValueError: there are no prompts, or one is no sequence, is empty, has tokens that are no
            integers or that the model does not know, or is too long for the cache or the model.
    """
    if not len(prompts):
        raise ValueError("prompts is empty: expected at least one prompt")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, expected at least 1")
    for i, prompt in enumerate(prompts):
        if not hasattr(prompt, "__len__"):
            raise ValueError(f"prompts[{i}]: expected the tokens of a prompt, got {brief(prompt)}")
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty: expected at least one token")
        if np.asarray(prompt).dtype.kind not in "iu":
            raise ValueError(f"prompts[{i}]: expected integers, got {brief(prompt)}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab:
            raise ValueError(
                f"prompts[{i}] has tokens from {min(prompt)} to {max(prompt)}, expected 0 to "
                f"{config.vocab - 1}"
            )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    needed = len(prompts[longest]) + tokens - 1
    room, whose = config.max_length, "the model was made for"
    if length is not None and length < room:
        room, whose = length, "the cache has room for"
    if needed > room:
        raise ValueError(
            f"prompts[{longest}] has {len(prompts[longest])} tokens, and {tokens} more are wanted, "
            f"but {whose} {room} positions"
        )
    return cache_length(len(prompts[longest]), tokens) if length is None else length


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
