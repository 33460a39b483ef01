"""Text in, text out, and the command line."""

import importlib
import io
import shutil
import sys

import families
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from safetensors.numpy import save_file

from df11_jax import models
from df11_jax.cli import _commands
from df11_jax.models._text import GrowingText

PROMPT = "It is raining."


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return families.write_family(tmp_path_factory.mktemp("hf") / "qwen2", "qwen2", shards=2)


@pytest.fixture(scope="module")
def model(directory):
    return models.load(directory)


def run(*arguments):
    return CliRunner().invoke(_commands.commands, ["generate", *map(str, arguments)])


def test_texts_are_the_tokens_decoded(model):
    prompts = [PROMPT, "Once"]
    completions = model.generate(prompts, tokens=20)
    ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    assert [row[0] for row in ids] == [families.BOS] * 2
    tokens = models.generate(model.params, ids, model.config, tokens=20, stop=model.stop)
    assert [completion.tokens for completion in completions] == tokens
    for completion in completions:
        assert completion.text == model.tokenizer.decode(completion.tokens)


@pytest.mark.parametrize("every", [1, 5])
def test_callback_gets_the_text_in_parts(model, every):
    parts = []
    completions = model.generate([PROMPT, "Once"], tokens=20, every=every, callback=parts.append)
    texts = ["".join(row) for row in zip(*parts, strict=True)]
    assert texts == [completion.text for completion in completions]


def in_parts(tokenizer, tokens, prompt=()):
    """What is shown after each token, and at the end."""
    text = GrowingText(tokenizer, prompt)
    parts = [text.add([token]) for token in tokens]
    parts.append(text.add([], last=True))
    assert text.shown == "".join(parts)
    return parts


def test_characters_of_several_tokens_come_whole(model):
    text = "Grüße, 世界"
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text)
    shown = in_parts(model.tokenizer, ids[:-1])
    assert [part for part in shown if part] == [*"Grüße, 世", "\N{REPLACEMENT CHARACTER}"]


def sentencepiece_like(*decoders):
    """A tokenizer with words that begin with a space, and bytes for all else."""
    words = ("▁It", "▁is", "▁", "a")
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[], byte_fallback=True))
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), *decoders]  # as Gemma has it
    )
    return tokenizer


def test_spaces_in_front_of_tokens_are_kept_after_a_prompt():
    tokenizer = sentencepiece_like(tokenizers.decoders.Strip(" ", 1, 0))  # as Llama 2 has it
    it, is_ = 256, 257
    assert tokenizer.decode([it, is_, is_]) == "It is is"
    assert in_parts(tokenizer, [is_, is_], prompt=[it]) == [" is", " is", ""]
    assert in_parts(tokenizer, [it, is_]) == ["It", " is", ""]


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        ("你好".encode(), ["", "", "你", "", "", "好", ""]),
        (b"a\xe4\xbd", ["a", "", "", "��"]),
        (b"\xff\xff", ["", "", "��"]),
        # The decoder takes back a character whose bytes are followed by others that are none.
        ([*"你".encode(), 0xFF, 259], ["", "", "你", "", "���a", ""]),
        ([259, 10_000, 259], ["a", "", "a", ""]),  # not in the vocabulary
    ],
)
def test_texts_of_bytes(tokens, parts):
    assert in_parts(sentencepiece_like(), [259 if t == 97 else t for t in tokens]) == parts


def test_texts_that_are_none(model):
    with pytest.raises(TypeError, match="prompts is a single text"):
        model.generate(PROMPT)
    with pytest.raises(TypeError, match=r"prompts\[1\]: expected a text, got 5"):
        model.generate(x for x in ("a", 5))
    with pytest.raises(ValueError, match=r"prompts\[1\] is no Unicode text.*surrogates"):
        model.generate(["a", "\udcff"])


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "prompts is empty"), (["a", ""], r"prompts\[1\] is empty")]
)
def test_nothing_to_continue(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts)


def test_memory_is_the_sum_of_its_parts(model):
    c = model.config
    programs = models.compile_programs(model.params, c, batch=2, prompt=5, tokens=20)
    memory = models.measure_memory(model.params, programs)
    slots = 128
    assert memory.cache == slots * 2 * (2 * 2 * c.layers * c.kv_heads * c.head_dim + 4)
    assert memory.weights < memory.plain_weights
    assert memory.peak == memory.weights + memory.cache + max(memory.prefill, memory.decode)


# The command.


def test_the_command_prints_text_and_what_it_took(directory, model):
    result = run(directory, "--prompt", PROMPT, "--tokens", 12)
    assert result.exit_code == 0, result.output
    (completion,) = model.generate([PROMPT], tokens=12)
    assert result.stdout == f"{PROMPT}{completion.text}\n"
    assert f"{len(completion.tokens)} tokens, the first after " in result.stderr
    assert " a second" in result.stderr
    assert "(plain: " in result.stderr and "temporary" in result.stderr
    exact = run(directory, "--prompt", PROMPT, "--tokens", 12, "--exact")
    assert "products after decompression, with the bits of plain weights\n" in exact.stderr
    plain = run(directory, "--prompt", PROMPT, "--tokens", 12, "--plain")
    assert plain.stdout == result.stdout
    assert "(plain: " not in plain.stderr and "products" not in plain.stderr


@pytest.mark.slow
def test_options_of_sampling_are_passed_on(directory, model):
    options = ("--temperature", 3, "--top-k", 40, "--top-p", 0.9, "--seed", 5)
    result = run(directory, "--prompt", PROMPT, "--tokens", 12, *options)
    sampling = models.Sampling(3.0, top_k=40, top_p=0.9)
    (completion,) = model.generate([PROMPT], tokens=12, sampling=sampling, seed=5)
    assert result.stdout == f"{PROMPT}{completion.text}\n"


def test_weights_are_cast_on_request(directory, tmp_path):
    source = families.source_of("qwen2")
    wide = {name: source.read(name).astype(np.float32) for name in source.tensors}
    path = families.write_directory(tmp_path / "wide", families.CONFIGS["qwen2"], wide)
    result = run(path, "--prompt", PROMPT, "--tokens", 3)
    assert result.exit_code == 2
    assert "expected BF16, got F32: ask for cast=True (--cast)" in result.output
    cast = run(path, "--prompt", PROMPT, "--tokens", 3, "--cast")
    assert cast.stdout == run(directory, "--prompt", PROMPT, "--tokens", 3).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "must not be empty"),
        (("--tokens", "1"), "Missing option '--prompt'"),
        (("--prompt", "a", "--tokens", "0"), "0 is not in the range 1<=x<="),
        (("--prompt", "a", "--tokens", "1000"), "but the model was made for 512 positions"),
        (("--prompt", "\udcff"), "is no Unicode text"),
        (("--prompt", "a", "--seed", 2**64), "is not in the range"),
        (("--prompt", "a", "--temperature", "-1"), "is not in the range x>=0"),
        (("--prompt", "a", "--temperature", "1", "--top-p", "2"), "top_p is 2"),
    ],
)
def test_wrong_use(directory, arguments, message):
    result = run(directory, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_directories_that_are_no_models(tmp_path):
    assert run(tmp_path / "nowhere", "--prompt", "a").exit_code == 2
    result = run(tmp_path, "--prompt", "a")
    assert result.exit_code == 2 and "expected model.safetensors" in result.output
    fields = {"model_type": "deepseek_v3"}
    path = families.write_directory(tmp_path / "m", fields, {"x": np.zeros(1, jnp.bfloat16)})
    result = run(path, "--prompt", "a")
    assert result.exit_code == 2 and "'deepseek_v3' is not supported" in result.output


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_terminal_would_obey_is_not_printed_there(monkeypatch, is_terminal):
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", output)
    shown = importlib.import_module("df11_jax.cli.generate")._shown("a\x1b[31mb\n\tc")
    assert shown == ("a\\x1b[31mb\n\tc" if is_terminal else "a\x1b[31mb\n\tc")


def test_one_of_several_variants(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "variants")
    index = path / "model.safetensors.index.json"
    index.rename(path / "bf16.safetensors.index.json")
    (path / "fp16.safetensors.index.json").write_text('{"weight_map": {}}')
    result = run(path, "--prompt", PROMPT)
    assert result.exit_code == 2 and "holds several variants" in result.output
    given = run(path / "bf16.safetensors.index.json", "--prompt", PROMPT, "--tokens", "5")
    assert given.exit_code == 0, given.output
    assert given.stdout == run(directory, "--prompt", PROMPT, "--tokens", "5").stdout


def test_adapters_are_no_models(directory, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    save_file({"lora_A": np.zeros((2, 2), np.float32)}, path / "adapter_model.safetensors")
    for given in (path, path / "adapter_model.safetensors"):
        result = run(given, "--prompt", "a")
        assert result.exit_code == 2
        assert f"{path}: is an adapter of PEFT for 'Qwen/Qwen3-8B', and no model" in result.output


def test_a_tokenizer_that_was_not_downloaded(directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "pointer")
    (path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    result = run(path, "--prompt", "a")
    assert result.exit_code == 2
    assert "tokenizer.json: is a pointer of Git LFS" in result.output


@pytest.mark.parametrize(
    ("parts", "method"), [(("qweight", "g_idx"), "gptq"), (("qweight", "qzeros"), "awq")]
)
def test_quantized_models_whose_config_does_not_say_so(tmp_path, parts, method):
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.{part}": np.zeros((2, 2), np.int32) for part in parts}
    path = families.write_directory(tmp_path / "m", families.CONFIGS["qwen2"], tensors)
    result = run(path, "--prompt", "a")
    assert result.exit_code == 2
    assert f"the weights are quantized ({method}, by the names of tensors)" in result.output
