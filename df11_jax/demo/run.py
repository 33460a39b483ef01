"""The demo: the same text from compressed and from plain weights, and what each costs."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

import df11_jax
from df11_jax._progress import ProgressBar
from df11_jax.demo import checkpoint, generation, model

CONFIG = model.Config()
REPEATS = 3
LOOK_SECONDS = 0.1  # between looks at the progress


class BitMismatchError(Exception):
    """Compressed and plain weights did not give the same bits."""


class TokenLoop:
    """The compiled token loop for one set of weights, and what it costs.

    Attributes:
        weight_bytes: the bytes of all arrays held, codebooks and padding included.
        temporary_bytes: XLA's peak beyond inputs and outputs.
        tokens_per_second: the speed of the fastest run.
    """

    def __init__(
        self, name: str, params: model.Params, prompt: str, tokens: int, key: jax.Array
    ) -> None:
        ids = jnp.asarray(list(prompt.encode()), jnp.int32)[None]
        start = ids.shape[1]
        self._name, self._params, self._tokens = name, params, tokens
        self._logits, self._cache = generation.prefill(params, ids, start + tokens, CONFIG)
        self._start, self._key = start, key
        first = generation.first_token(self._logits, key, 0.0, tokens)
        self._program = generation.next_tokens.lower(
            params, first, self._cache, 1, tokens, start, key, jnp.float32(0), config=CONFIG
        ).compile()
        memory = self._program.memory_analysis()
        assert memory is not None, "XLA reports memory on CPU, GPU and TPU"
        self.temporary_bytes = memory.temp_size_in_bytes
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self.tokens_per_second = 0.0

    def run(self, temperature: float, bar: ProgressBar) -> generation.Generation:
        """Generates once, and counts the tokens."""
        heat = jnp.float32(temperature)
        began = time.perf_counter()
        result = generation.first_token(self._logits, self._key, heat, self._tokens)
        cache = jax.tree.map(jnp.copy, self._cache)  # what the program is given is donated
        bar.update(self._name, 1)
        done, every, seen = 1, 1, began
        while done < self._tokens:
            end = min(done + every, self._tokens)
            result, cache = self._program(
                self._params, result, cache, done, end, self._start, self._key, heat
            )
            jax.block_until_ready(result)
            bar.update(self._name, end - done)
            done, before, seen = end, seen, time.perf_counter()
            if seen - before < LOOK_SECONDS:
                every *= 2  # a long cache makes tokens slow, a short one calls of the program dear
        rate = result.tokens.size / (time.perf_counter() - began)
        self.tokens_per_second = max(self.tokens_per_second, rate)
        return result


class Comparison(NamedTuple):
    """The text that compressed and plain weights both give, and what each costs.

    Attributes:
        text: the sampled text, without the prompt.
        tokens: the number of tokens that were compared.
        logits: the number of logits that were compared.
        weights: the number of weights of the model.
        platform: the platform of JAX that ran it.
        plain: the costs with plain weights.
        compressed: the costs with compressed weights.
    """

    text: str
    tokens: int
    logits: int
    weights: int
    platform: str
    plain: TokenLoop
    compressed: TokenLoop


def run_demo(
    prompt: str, tokens: int, temperature: float, seed: int, *, progress: bool = False
) -> Comparison:
    """Generates with compressed and plain weights, and compares every bit.

    Args:
        prompt: the text to continue.
        tokens: the number of bytes to add.
        temperature: the temperature of the text; greedy decoding is run and compared as well.
        seed: the seed for sampling.
        progress: whether to show a progress bar, in tokens of all runs.

    Raises:
        BitMismatchError: a logit or a token differs in any bit.
    """
    compressed_params = checkpoint.load_checkpoint()
    plain_params = df11_jax.decompress_params(compressed_params)
    key = jax.random.key(seed)
    plain = TokenLoop("plain", plain_params, prompt, tokens, key)
    compressed = TokenLoop("compressed", compressed_params, prompt, tokens, key)

    total = 2 * (1 + REPEATS) * tokens
    with ProgressBar("generate", total, unit="tokens", show=progress) as bar:
        _require_same_bits(plain.run(0, bar), compressed.run(0, bar), "greedy")
        for _ in range(REPEATS):  # in turn, so that whatever else the machine does meets both
            sampled = compressed.run(temperature, bar)
            _require_same_bits(plain.run(temperature, bar), sampled, "sampled")

    return Comparison(
        text=bytes(np.asarray(sampled.tokens[0], np.uint8)).decode(errors="replace"),
        tokens=sampled.tokens.size,
        logits=sampled.logits.size,
        weights=sum(leaf.size for leaf in jax.tree.leaves(plain_params)),
        platform=jax.default_backend(),
        plain=plain,
        compressed=compressed,
    )


def _require_same_bits(
    plain: generation.Generation, compressed: generation.Generation, name: str
) -> None:
    """Raises `BitMismatchError` naming the first generated byte that differs."""
    for field in generation.Generation._fields:
        expected, actual = _bits(getattr(plain, field)), _bits(getattr(compressed, field))
        different = np.argwhere(expected != actual)
        if len(different):
            at = tuple(different[0])
            raise BitMismatchError(
                f"{name} {field} from compressed and plain weights differ in {len(different)} of "
                f"{expected.size} places, first at byte {at[1]}: "
                f"{actual[at]:#010x} instead of {expected[at]:#010x}"
            )


def _bits(array: Shaped[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Bit patterns, so that -0 differs from 0 and one NaN from another."""
    return np.asarray(array).view(np.uint32)
