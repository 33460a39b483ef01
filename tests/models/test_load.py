"""Loading: what arrives is what was there; what does not fit is named."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from payloads import assert_same_bits

import df11_jax
from df11_jax import checkpoints, models
from df11_jax.cli import _commands
from df11_jax.models import prompts
from df11_jax.models._leaf_builders import transpose


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return families.write_family(tmp_path_factory.mktemp("hf") / "llama", "llama", shards=3)


def tensors_of(family):
    source = families.source_of(family)
    return {name: source.read(name) for name in source.tensors}


def write(path, tensors, shards=1, **fields):
    return families.write_directory(path, families.CONFIGS["llama"] | fields, tensors, shards)


# What arrives.


@pytest.mark.parametrize("compress", [True, False])
def test_every_tensor_is_where_it_belongs(directory, compress):
    model = models.load(directory, compress=compress)
    params = df11_jax.decompress_params(model.params)
    tensors = tensors_of("llama")
    for name in ("embed_tokens", "lm_head"):
        table = tensors[{"embed_tokens": "model.embed_tokens.weight"}.get(name, f"{name}.weight")]
        rows = np.asarray(params[name]).reshape(-1, table.shape[1])
        assert_same_bits(rows[: len(table)], table)
        assert not rows[len(table) :].any()
        if compress:  # as products with the transpose read it
            assert model.params[name].layout.along_columns
    assert_same_bits(params["norm"], tensors["model.norm.weight"])
    for layer in range(model.config.layers):
        prefix = f"model.layers.{layer}."
        block = jax.tree.map(lambda leaf, i=layer: np.asarray(leaf[i]), params["layers"])
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected = tensors[f"{prefix}self_attn.{name}.weight"].T
            assert_same_bits(block["self_attn"][name]["kernel"], expected)
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert_same_bits(block["mlp"][name]["kernel"], tensors[f"{prefix}mlp.{name}.weight"].T)
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert_same_bits(block[name]["scale"], tensors[f"{prefix}{name}.weight"])
    assert model.stop == (families.EOS,)


def test_multimodal_checkpoints_have_the_text_model_inside(tmp_path):
    text = families.CONFIGS["gemma3_text"]
    inner = models.load(families.write_family(tmp_path / "text", "gemma3_text"))
    # What sees has layers with keys and values of its own.
    parts = ("vision_model.embeddings", "vision_model.encoder.layers.0.self_attn.k_proj")
    tensors = {f"vision_tower.{part}.weight": np.zeros((2, 2), np.float32) for part in parts}
    tensors["multi_modal_projector.weight"] = np.zeros(2, np.float32)
    for style in ("language_model.model.", "model.language_model."):
        renamed = {
            name.replace("model.", style, 1): tensor
            for name, tensor in tensors_of("gemma3_text").items()
        }
        fields = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
        path = families.write_directory(tmp_path / style, fields, tensors | renamed)
        with pytest.warns(match="left out: multi_modal_projector, vision_tower$"):
            model = models.load(path)
        assert model.config == inner.config
        assert model.stop == (1, 106)
        for actual, want in zip(*map(jax.tree.leaves, (model.params, inner.params)), strict=True):
            np.testing.assert_array_equal(actual, want)


@pytest.mark.parametrize(
    ("family", "model_type", "parts"),
    [
        ("qwen3_5_text", "qwen3_5", ["model.visual.x", "mtp.norm.weight"]),
        ("gemma4_text", "gemma4", ["model.audio_tower.x", "model.embed_vision.x"]),
    ],
)
def test_what_text_generation_does_not_need(tmp_path, family, model_type, parts):
    tensors = tensors_of(family)
    inner = models.load(families.write_directory(tmp_path / "m", families.CONFIGS[family], tensors))
    if family == "gemma4_text":  # keys of layers that share those of others
        parts = [*parts, *(f"model.layers.{i}.self_attn.k_proj.weight" for i in (4, 5))]
    tensors |= dict.fromkeys(parts, np.zeros(2, np.float32))
    fields = {"model_type": model_type, "text_config": families.CONFIGS[family]}
    path = families.write_directory(tmp_path / "whole", fields, tensors)
    with pytest.warns(match="left out: (mtp, visual|audio_tower, embed_vision)$"):
        model = models.load(path)
    assert model.config == inner.config
    for actual, want in zip(*map(jax.tree.leaves, (model.params, inner.params)), strict=True):
        np.testing.assert_array_equal(actual, want)


def test_decays_keep_their_float32(tmp_path):
    tensors = tensors_of("qwen3_5_text")
    fine = np.float32(1) / np.arange(3, 7, dtype=np.float32)
    tensors["model.layers.2.linear_attn.A_log"] = fine
    fields = families.CONFIGS["qwen3_5_text"]
    params = models.load(families.write_directory(tmp_path / "m", fields, tensors)).params
    for name in ("A_log", "dt_bias"):
        stack = params["layers"]["linear"]["linear_attn"][name]
        expected = [tensors[f"model.layers.{i}.linear_attn.{name}"] for i in (0, 2)]
        assert stack.dtype == np.float32
        np.testing.assert_array_equal(stack, np.stack([x.astype(np.float32) for x in expected]))


# Of the one, all tensors are leaves; the others have fused ones.
@pytest.mark.parametrize(
    ("family", "format_"),
    [(family, format_) for family in ("llama", "phi3") for format_ in ("native", "published")]
    + [("qwen3_5_text", "native")],
)
def test_compressed_checkpoints_load_as_well(family, tmp_path, format_):
    directory = families.write_family(tmp_path / family, family, shards=3)
    arguments = ["compress", str(directory), str(tmp_path / "m"), "--format", format_]
    result = CliRunner().invoke(_commands.commands, arguments)
    assert result.exit_code == 0, result.output
    assert checkpoints.open_checkpoint(tmp_path / "m").format == format_
    model, original = models.load(tmp_path / "m"), models.load(directory)
    assert model.config == original.config and model.stop == original.stop
    for actual, want in zip(*map(jax.tree.leaves, (model.params, original.params)), strict=True):
        np.testing.assert_array_equal(actual, want)


def save_beside(model, directory, path):
    """Saves parameters, and copies what else there is of the model beside them."""
    checkpoints.save(model.params, path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(directory / name, path)
    return path


def assert_same_model(actual, expected):
    assert actual.config == expected.config and actual.stop == expected.stop
    assert jax.tree.structure(actual.params) == jax.tree.structure(expected.params)
    for a, b in zip(*map(jax.tree.leaves, (actual.params, expected.params)), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        assert a.sharding == b.sharding


def saved_forms(path, tmp_path):
    """The same parameters as saved, without compression, and compressed leaf by leaf."""
    yield path
    for command, source, target in (
        ("decompress", path, tmp_path / "plain"),
        ("compress", tmp_path / "plain", tmp_path / "by leaf"),
    ):
        arguments = [command, str(source), str(target)]
        result = CliRunner().invoke(_commands.commands, arguments)
        assert result.exit_code == 0, result.output
        yield target


@pytest.mark.parametrize("devices", [None, 2])
def test_saved_parameters_load_as_they_were(tmp_path, devices):
    directory = families.write_family(tmp_path / "phi3", "phi3")
    model = models.load(directory, devices=devices)
    plain = models.load(directory, devices=devices, compress=False)
    path = save_beside(model, directory, tmp_path / "saved")
    for form in saved_forms(path, tmp_path):
        assert_same_model(models.load(form, devices=devices), model)
    assert_same_model(models.load(path, devices=devices, compress=False), plain)
    path = save_beside(plain, directory, tmp_path / "saved plain")
    assert_same_model(models.load(path, devices=devices), model)


def test_saved_parameters_that_do_not_fit(directory, tmp_path):
    model = models.load(directory)
    path = tmp_path / "saved"
    checkpoints.save(model.params, path)
    with pytest.raises(
        FileNotFoundError, match=r"config\.json: is missing. Weights that were saved"
    ):
        models.load(path)
    for change, message in (
        ({"norm": None}, "norm: is missing"),
        ({"other": model.params["norm"]}, "other: has no place in the model"),
        ({"norm": jnp.zeros(65, jnp.bfloat16)}, r"norm: expected shape \[64\] .*got \[65\]"),
        ({"norm": jnp.zeros(64)}, "norm: expected BF16, got F32"),
        (
            {"lm_head": jnp.zeros((1, 256, 64), jnp.bfloat16)},
            r"lm_head: expected shape \[1, 320, 64\] for 1 device, got \[1, 256, 64\]",
        ),
        (
            {"lm_head": jnp.zeros((2, 320, 64), jnp.bfloat16)},
            r"lm_head: expected shape \[1, 320, 64\] for 1 device, got \[2, 320, 64\]",
        ),
    ):
        changed = {k: v for k, v in (model.params | change).items() if v is not None}
        checkpoints.save(changed, tmp_path / "changed.safetensors")
        source = checkpoints.open_checkpoint(tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=message):
            models.load_params(source, model.config)


def test_incompressible_and_small_leaves_stay_plain():
    config = models.read_config(families.CONFIGS["llama"])
    source = families.NoisySource(config)
    params = models.load_params(source, config)
    compressed = {leaf.path for leaf in df11_jax.size_report(params).leaves if leaf.compressed}
    assert compressed == {
        "embed_tokens",
        "lm_head",
        "layers/mlp/gate_proj/kernel",
        "layers/mlp/down_proj/kernel",
    }
    plain = models.load_params(source, config, compress=False)
    up = params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
        np.asarray(up).view(np.uint16),
        np.asarray(plain["layers"]["mlp"]["up_proj"]["kernel"]).view(np.uint16),
    )


def test_a_tied_head_in_the_file_is_left_out(tmp_path):
    tensors = tensors_of("qwen2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    path = families.write_directory(tmp_path / "m", families.CONFIGS["qwen2"], tensors)
    assert "lm_head" not in models.load(path).params


def test_a_tied_head_that_is_not_the_embedding(tmp_path):
    tensors = tensors_of("qwen2")
    head = tensors["model.embed_tokens.weight"].copy()
    head[7, 3] = 1
    path = families.write_directory(
        tmp_path / "m", families.CONFIGS["qwen2"], tensors | {"lm_head.weight": head}
    )
    message = r"lm_head\.weight is not model\.embed_tokens\.weight.*\[7, 3\].*tie_word_embeddings"
    with pytest.raises(ValueError, match=message):
        models.load(path)
    fields = families.CONFIGS["qwen2"] | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(fields))
    rows = np.asarray(df11_jax.decompress_params(models.load(path).params)["lm_head"])
    assert_same_bits(rows.reshape(-1, 64)[: families.VOCAB], head)


def test_ranks_and_dtypes_that_users_do_not_let_jax_promote(directory):
    expected = models.load(directory).params
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, models.load(directory).params, expected)


@pytest.mark.parametrize("shape", [(64, 128), (4, 5), (130, 70), (132, 7), (1, 9), (68, 1)])
def test_transpose(shape):
    bits = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    with ThreadPoolExecutor(2) as pool:
        out = transpose(bits.view(jnp.bfloat16), pool)
    assert out.dtype == jnp.bfloat16 and out.flags.c_contiguous
    np.testing.assert_array_equal(out.view(np.uint16), bits.T)


@pytest.mark.parametrize("devices", [None, 2])
def test_another_checkpoint_takes_the_shapes_of_the_first(devices):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 150}
    config = models.read_config(families.CONFIGS["qwen3"] | sizes)
    first, second = (
        models.load_params(models.RandomSource(config, seed), config, devices=devices)
        for seed in (0, 1)
    )
    compiled = jax.jit(df11_jax.decompress_params).lower(first).compile()
    # The tables are small enough to differ in length.
    with pytest.raises(TypeError, match=r"embed_tokens|lm_head"):
        compiled(second)
    weights = compiled(df11_jax.compress_params(second, like=first))
    jax.tree.map(assert_same_bits, weights, df11_jax.decompress_params(second))


# Memory.

_MEASURE = """
import re, sys, threading
import jax
jax.config.update("jax_platforms", "cpu")
from df11_jax import models, size_report

config = models.read_config({
    "model_type": "llama", "vocab_size": 20000, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 12, "num_attention_heads": 16, "tie_word_embeddings": True,
})

class Repeating(models.RandomSource):
    # One layer's tensors are drawn once: drawing is slow.
    drawn = {}
    def read(self, name):
        kind = re.sub("[0-9]+", "", name)
        if kind not in self.drawn:
            self.drawn[kind] = super().read(name)
        return self.drawn[kind].copy()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

source = Repeating(config)
for name in source.tensors:
    source.read(name)
jax.numpy.zeros(3).block_until_ready()
before, peak, stop = anonymous(), [0], threading.Event()

def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
params = models.load_params(source, config, compress=sys.argv[1] == "compress")
stop.set()
thread.join()
print(peak[0] - before, size_report(params).nbytes, size_report(params).nbytes_before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["compress", "plain"])
def test_memory_on_the_host_is_that_of_the_result(how):
    result = subprocess.run(
        [sys.executable, "-P", "-c", _MEASURE, how], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    peak, nbytes, plain = map(int, result.stdout.split())
    largest = 2 * 20000 * 1024  # the embedding
    assert nbytes < 0.7 * plain if how == "compress" else nbytes == plain
    assert peak < nbytes + 3 * largest
    assert how == "plain" or peak < 0.9 * plain


# What does not fit.


def test_missing_files(directory, tmp_path):
    path = write(tmp_path / "config", tensors_of("llama"))
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.load(path)
    path = write(tmp_path / "shards", tensors_of("llama"), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        models.load(path)
    path = write(tmp_path / "tokenizer", tensors_of("llama"))
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.* stand for$"):
        models.load(path)
    (path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"for\. From tokenizer\.model, transformers makes"):
        models.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"tensors are missing \(a llama.*: model\.norm\.weight"),
        (
            {"model.layers.1.self_attn.q_proj.bias": np.zeros(64, jnp.bfloat16)},
            r"no place in the model \(a llama.*model\.layers\.1\.self_attn\.q_proj\.bias",
        ),
        (
            {"model.layers.2.mlp.up_proj.weight": np.zeros((64, 160), jnp.bfloat16)},
            r"model\.layers\.2\.mlp\.up_proj\.weight: expected shape \[160, 64\], got \[64, 160\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    tensors = {k: v for k, v in (tensors_of("llama") | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        models.load(write(tmp_path / "m", tensors))


def test_the_largest_sizes(tmp_path):
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    fields = dict.fromkeys(names, 2**24) | {"num_key_value_heads": 1, "head_dim": 128}
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: expected shape \[16777216, 16"):
        models.load(write(tmp_path / "m", tensors_of("llama"), **fields))


def test_many_missing_tensors_are_not_all_listed(tmp_path):
    path = write(tmp_path / "m", tensors_of("llama"), num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"model\.layers\.3\..* and 6 more$"):
        models.load(path)


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "F32"), (np.float16, "F16")])
def test_other_dtypes_are_cast_only_on_request(tmp_path, dtype, name):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_of("llama").items()}
    path = write(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=f"embed_tokens.weight: expected BF16, got {name}.*cast"):
        models.load(path)
    params = models.load(path, cast=True, compress=False).params
    assert params["norm"].dtype == jnp.bfloat16
    expected = tensors["model.norm.weight"].astype(jnp.bfloat16)
    assert_same_bits(params["norm"], expected)


def test_integers_are_not_cast(tmp_path):
    tensors = tensors_of("llama") | {"model.norm.weight": np.zeros(64, np.int8)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected BF16, got I8$"):
        models.load(write(tmp_path / "m", tensors), cast=True)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_files_that_are_not_what_they_should_be(directory, tmp_path, content):
    path = write(tmp_path / "m", {})
    (path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: (is not a JSON|expected a JSON object)"):
        models.load(path)


def test_a_damaged_tokenizer(tmp_path):
    path = write(tmp_path / "m", tensors_of("llama"))
    before = (path / "tokenizer.json").read_text()
    # The last one makes the library panic, which is no Exception.
    panics = '{"version":"1.0","model":{"type":"BPE","continuing_subword_prefix":"long",'
    panics += '"vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}}'
    for content in ('{"version": 1}', before[:-9], panics):
        (path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
            models.load(path)


def test_a_tokenizer_that_cannot_encode():
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="b")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode the prompts \(.*Missing"):
        prompts.encode(tokenizers.Tokenizer(model), ["c"])


@pytest.mark.parametrize(
    ("fields", "generation", "stop"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 5, "text_config": None}, None, (5,)),
    ],
)
def test_what_ends_a_text(tmp_path, fields, generation, stop):
    path = write(tmp_path / "m", {}, **fields)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert models.read_directory(path)[2] == stop


def test_what_ends_a_text_of_multimodal_models(tmp_path):
    text = families.CONFIGS["gemma3_text"] | {"eos_token_id": 6}
    for outer in ({}, {"eos_token_id": None}, {"eos_token_id": [6]}):
        fields = {"model_type": "gemma3", "text_config": text} | outer
        path = families.write_directory(tmp_path / str(outer), fields, {})
        assert models.read_directory(path)[2] == (6,)


@pytest.mark.parametrize("stop", ["x", 1.5, True, -1, 2**40, [1, None]])
def test_what_cannot_end_a_text(tmp_path, stop):
    path = write(tmp_path / "m", {}, eos_token_id=stop)
    with pytest.raises(ValueError, match=r"eos_token_id is .*, expected one or several tokens"):
        models.load(path)
