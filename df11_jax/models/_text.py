"""Models with their tokenizers, which continue texts."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from df11_jax._brief import brief
from df11_jax._files.folder import CONFIG, Folder
from df11_jax._files.folder_source import FolderSource
from df11_jax._files.other_formats import OtherFormatError, find_format
from df11_jax._files.source import Source
from df11_jax.checkpoints import open_checkpoint
from df11_jax.checkpoints.detect import ADAPTER_CONFIG, is_adapter
from df11_jax.models._config import Config
from df11_jax.models._devices import Devices
from df11_jax.models._generate import generate
from df11_jax.models._hf_config import read_config
from df11_jax.models._load import load_params
from df11_jax.models._sampling import Sampling
from df11_jax.models._transformer import Params
from df11_jax.models.prompts import encode

if TYPE_CHECKING:
    import tokenizers

# The files of tokenizers that older models have in place of tokenizer.json.
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json")


class Completion(NamedTuple):
    """The text that was generated after a prompt.

    Attributes:
        text: the text without special tokens.
        tokens: its tokens without the stop token, if there was one.
    """

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A transformer with all that it needs to continue texts.

    Attributes:
        params: plain or compressed parameters.
        config: the configuration of the transformer.
        tokenizer: a tokenizer of the `tokenizers` package.
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
            prompts: the texts; the tokenizer puts its special tokens in front of them.
            tokens: the most tokens to generate for each text.
            sampling: the way to choose them; None for the likeliest ones.
            seed: the seed of sampling.
            length: the length of the key-value cache in tokens; None for what is needed, rounded
                up so that prompts of similar lengths share a program.
            every: the number of tokens to generate between calls of `callback`.
            callback: a function that is called with the new part of each text, as it comes. A part
                may be empty, because a character can take several tokens.

        Returns:
            The completion of each prompt.

        Raises:
            TypeError: `prompts` is a single text.
            ValueError: there are no prompts, or one is empty, no Unicode text, or too long for the
                cache.
        """
        ids = encode(self.tokenizer, prompts)
        texts = [GrowingText(self.tokenizer, row) for row in ids]

        def add(rows: list[list[int]]) -> None:
            new = [text.add(row) for text, row in zip(texts, rows, strict=True)]
            if callback is not None:
                callback(new)

        tokens_of_each = generate(
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


class GrowingText:
    """A text that grows token by token; a character may take several tokens.

    The text of a token can depend on the tokens before: some tokenizers drop the space in front of
    the first. So new tokens are decoded together with the tokens that were shown last, whose text
    is then removed. `tokenizers.decoders.DecodeStream` does that as well, but raises an error if
    bytes that are not UTF-8 change how bytes before them are decoded.

    Attributes:
        shown: the text that `add` has returned so far.
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
        # The new tokens begin where a character begins.
        self._before, self._new = self._new, []
        self.shown += new
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def load(
    path: str | os.PathLike[str],
    *,
    compress: bool = True,
    exact: bool = False,
    cast: bool = False,
    verify: bool = True,
    progress: bool = False,
    threads: int | None = None,
    devices: Devices | None = None,
    stages: int = 1,
) -> TextModel:
    """Loads a model from a Hugging Face directory.

    Each tensor is compressed as soon as it is read, so that beside the compressed model the host
    needs memory for a few tensors only.

    Args:
        path: the path of a directory with `config.json`, `tokenizer.json` and weights, which are
            plain, native, or published as DFloat11; or the parameters that this function returned,
            as `checkpoints.save` or Orbax wrote them, for as many devices or for others: see
            `load_params`.
        compress: False for plain bfloat16 weights.
        exact: decompress a block before it is computed, which gives the bits of plain weights, on
            GPUs that could fuse that with the products as well; see `Config`.
        cast: round float32 and float16 tensors to bfloat16, which is not lossless.
        verify: decode each tensor and compare it bit by bit before going on.
        progress: show a progress bar, in bytes.
        threads: the number of threads; None for all that this process may run on.
        devices: the devices to divide the model over, or their number; None for the default device
            alone, or if there are several processes, for all devices of all of them. Each process
            has to call this, and reads, compresses and holds what its own devices need.
        stages: the number of stages that layers and devices are divided into, a pipeline; each
            stage is divided over its devices, which are neighbours in the list of all.

    Returns:
        The model, ready to generate.

    Raises:
        FileNotFoundError: a file or shard is missing.
        UnsupportedModelError: another architecture, or a variant that is not implemented.
        ValueError: a tensor is missing, not bfloat16, or of another shape than `config.json` says;
            a file is damaged; there are not as many devices, or the model cannot be divided among
            them.
    """
    source = open_checkpoint(path)
    config, tokenizer, stop = read_directory(source)
    config = dataclasses.replace(config, exact=exact)
    params = load_params(
        source,
        config,
        compress=compress,
        cast=cast,
        verify=verify,
        progress=progress,
        threads=threads,
        devices=devices,
        stages=stages,
    )
    return TextModel(params, config, tokenizer, stop)


def read_directory(
    model: str | os.PathLike[str] | Source,
) -> tuple[Config, "tokenizers.Tokenizer", tuple[int, ...]]:
    """Reads all of a model but its weights from a Hugging Face directory.

    Args:
        model: the path of the directory, or the checkpoint in it, which is open already.

    Returns:
        Configuration, tokenizer and stop tokens.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: tokenizers is not installed.
        UnsupportedModelError: another architecture, or a variant that is not implemented.
        ValueError: a file is damaged, or was replaced while others were opened.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f'text needs tokenizers ({error}). Install with: pip install "df11_jax[models]"'
        ) from None

    source = open_checkpoint(model) if isinstance(model, (str, os.PathLike)) else model
    folder = source.folder if isinstance(source, FolderSource) else Folder(source.path)
    if is_adapter(folder):
        base = brief(folder.json(ADAPTER_CONFIG).get("base_model_name_or_path"))
        raise ValueError(
            f"{folder.directory}: is an adapter of PEFT for {base}, and no model. Merge them with "
            "PEFT (`merge_and_unload`), save what comes out, and give its directory"
        )
    try:
        fields = folder.json(CONFIG)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder.directory / CONFIG}: is missing. Weights that were saved by themselves need "
            "config.json, tokenizer.json and generation_config.json of the model beside them"
        ) from None
    config = read_config(fields, str(folder.directory / CONFIG))
    try:
        text = folder.content("tokenizer.json")
    except FileNotFoundError:
        hint = next(
            (
                f". From {name}, transformers makes it: AutoTokenizer.from_pretrained(directory)"
                ".save_pretrained(directory)"
                for name in _OTHER_TOKENIZERS
                if (folder.directory / name).exists()
            ),
            "",
        )
        raise FileNotFoundError(
            f"{folder.directory / 'tokenizer.json'}: is missing; it says which texts tokens stand "
            f"for{hint}"
        ) from None
    if kind := find_format(text):
        raise OtherFormatError(f"{folder.directory / 'tokenizer.json'}: is {kind}; expected JSON")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(text)
    except BaseException as error:  # tokenizers has no class of its own for it, and panics of Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(
            f"{folder.directory / 'tokenizer.json'}: cannot be read as a tokenizer ({error})"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    stop = _stop_tokens(folder, fields)
    folder.check_together()
    return config, tokenizer, stop


def _stop_tokens(folder: Folder, fields: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, by `generation_config.json`, or else by `config.json`."""
    file = "generation_config.json"
    generation = folder.json(file) if (folder.directory / file).exists() else {}
    inner = fields.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    said = (object_.get("eos_token_id") for object_ in (generation, fields, inner))
    stop: Any = next((tokens for tokens in said if tokens is not None), [])
    tokens = stop if isinstance(stop, list) else [stop]
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise ValueError(
            f"{folder.directory}: eos_token_id is {brief(stop)}, expected one or several tokens"
        )
    return tuple(tokens)
