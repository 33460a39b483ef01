"""Models with their tokenizers: text in, text out."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from df11_jax._files.directory import CONFIG, read_json
from df11_jax.checkpoints import open_checkpoint
from df11_jax.models import _generate
from df11_jax.models._config import Config
from df11_jax.models._hf_config import read_config
from df11_jax.models._load import load_params
from df11_jax.models._placement import Devices
from df11_jax.models._sampling import Sampling
from df11_jax.models._transformer import Params

if TYPE_CHECKING:
    import tokenizers


class Completion(NamedTuple):
    """What was generated after a prompt.

    Attributes:
        text: without special tokens.
        tokens: without the stop token, if there was one.
    """

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A decoder with all that it needs to write text.

    Attributes:
        params: plain or compressed.
        config: of the decoder.
        tokenizer: of the `tokenizers` package.
        stop: tokens that end a text.
    """

    params: Params
    config: Config
    tokenizer: "tokenizers.Tokenizer"
    stop: tuple[int, ...]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        tokens: int = 100,
        sampling: Sampling | None = None,
        seed: int = 0,
        length: int | None = None,
        every: int = 8,
        callback: Callable[[list[str]], None] | None = None,
    ) -> list[Completion]:
        """Continues texts.

        Args:
            prompts: the texts; special tokens are put in front of them as the tokenizer does it.
            tokens: how many to generate for each, at most.
            sampling: how to choose them; None for the likeliest ones.
            seed: for sampling.
            length: of the key-value cache, in tokens; None for as long as is needed.
            every: how many tokens to generate between calls of `callback`.
            callback: gets what is new of each text, as it comes; that may be nothing, as
                characters can take several tokens.

        Returns:
            What comes after each prompt.

        Raises:
            TypeError: `prompts` is a single text.
            ValueError: there are no prompts, or one is empty, no Unicode text, or too long for the
                cache.
        """
        ids = encode(self.tokenizer, prompts)
        texts = [_Text(self.tokenizer, row) for row in ids]

        def add(rows: list[list[int]]) -> None:
            new = [text.add(row) for text, row in zip(texts, rows, strict=True)]
            if callback is not None:
                callback(new)

        tokens_of_each = _generate.generate(
            self.params,
            ids,
            self.config,
            tokens=tokens,
            sampling=sampling,
            seed=seed,
            stop=self.stop,
            length=length,
            every=every,
            callback=add,
        )
        rest = [text.add([], last=True) for text in texts]
        if callback is not None and any(rest):
            callback(rest)
        return [
            Completion(text.shown, new) for text, new in zip(texts, tokens_of_each, strict=True)
        ]


class _Text:
    """A text that grows token by token; characters may take several.

    What tokens stand for can depend on those before: some tokenizers drop the space in front of
    the first. So new tokens are decoded together with those that were shown last, whose text is
    then taken away. `tokenizers.decoders.DecodeStream` does that as well, but ends with an error
    if bytes that are no UTF-8 change how bytes before them are decoded.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt)
        self._new: list[int] = []
        self.shown = ""

    def add(self, tokens: list[int], *, last: bool = False) -> str:
        """The characters that are complete with these tokens.

        Args:
            tokens: the next ones.
            last: nothing comes after them; what is incomplete is shown as replacement characters.
        """
        self._new += tokens
        if not self._new:
            return ""
        before = self._decode(self._before)
        new = self._decode(self._before + self._new)[len(before) :]
        if new.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        # They begin where a character does.
        self._before, self._new = self._new, []
        self.shown += new
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def load(
    path: str | os.PathLike[str],
    *,
    compress: bool = True,
    cast: bool = False,
    verify: bool = True,
    progress: bool = False,
    threads: int | None = None,
    devices: Devices | None = None,
) -> TextModel:
    """Loads a model from a Hugging Face directory.

    Weights are compressed as they arrive, so beside the compressed model the host holds what a
    few tensors need.

    Args:
        path: of a directory with `config.json`, `tokenizer.json` and weights: plain, native, or
            published as DFloat11.
        compress: False for plain bfloat16 weights.
        cast: round float32 and float16 tensors to bfloat16, which is not lossless.
        verify: decode each tensor and compare it bit by bit before going on.
        progress: show a progress bar, in bytes.
        threads: how many threads to use; None for all that this process may run on.
        devices: to divide the model over, or how many of this host; None for the default device
            alone.

    Returns:
        The model, ready to generate.

    Raises:
        FileNotFoundError: a file or shard is missing.
        UnsupportedModelError: another architecture, or a variant that is not implemented.
        ValueError: a tensor is missing, not bfloat16, or of another shape than `config.json` says;
            a file is damaged; there are not as many devices, or the model cannot be divided among
            them.
    """
    config, tokenizer, stop = read_directory(path)
    params = load_params(
        open_checkpoint(path),
        config,
        compress=compress,
        cast=cast,
        verify=verify,
        progress=progress,
        threads=threads,
        devices=devices,
    )
    return TextModel(params, config, tokenizer, stop)


def read_directory(
    path: str | os.PathLike[str],
) -> tuple[Config, "tokenizers.Tokenizer", tuple[int, ...]]:
    """All of a model but its weights, from a Hugging Face directory.

    Args:
        path: of the directory.

    Returns:
        Configuration, tokenizer and stop tokens.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: tokenizers is not installed.
        UnsupportedModelError: another architecture, or a variant that is not implemented.
        ValueError: a file is damaged.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f'text needs tokenizers ({error}). Install with: pip install "df11_jax[models]"'
        ) from None

    path = Path(path)
    fields = read_json(path / CONFIG)
    config = read_config(fields, str(path / CONFIG))
    file = path / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: is missing; it says which texts tokens stand for")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # tokenizers has no class of its own for it, and panics of Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{file}: cannot be read as a tokenizer ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return config, tokenizer, _stop_tokens(path, fields)


def encode(tokenizer: "tokenizers.Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, with special ones in front of them as the tokenizer has it.

    Raises:
        TypeError, ValueError: as `TextModel.generate`.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a single text, expected a list of texts")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty: expected some text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts[{i}] is no Unicode text: {error}") from None
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    except Exception as error:  # such as an unknown token that is not in the vocabulary
        raise ValueError(
            f"the model's tokenizer.json cannot encode the prompts ({error})"
        ) from None


def _stop_tokens(path: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end a text: as `generation_config.json` says, or else the configuration."""
    file = path / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    inner = fields.get("text_config") if fields.get("model_type") == "gemma3" else None
    said = (object_.get("eos_token_id") for object_ in (generation, fields, inner or {}))
    stop: Any = next((tokens for tokens in said if tokens is not None), [])
    tokens = stop if isinstance(stop, list) else [stop]
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise ValueError(f"{path}: eos_token_id is {stop!r:.80}, expected one or several tokens")
    return tuple(tokens)
