import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import model_files
import numpy as np
import pytest
from commands import die, process, run

from df11_jax._host_arrays import BFLOAT16
from df11_jax.checkpoints import open_checkpoint
from df11_jax.cli import main

FIXTURE = Path(__file__).parents[1] / "published" / "fixtures" / "tiny_llama"
ORIGINAL, PUBLISHED = FIXTURE / "original", FIXTURE / "sharded"


@pytest.fixture(scope="module")
def weights():
    return model_files.tensors()


@pytest.fixture
def plain(tmp_path, weights):
    return model_files.write_model(tmp_path / "plain", weights, shards=9)


def test_there_and_back(tmp_path, plain, weights):
    output = run("compress", plain, tmp_path / "native")
    assert "native: native, 17 tensors, " in output and "bits per weight" in output
    assert "All 17 tensors" in run("verify", plain, tmp_path / "native")
    run("decompress", tmp_path / "native", tmp_path / "back")
    model_files.assert_holds(open_checkpoint(tmp_path / "back"), weights)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    run("compress", "--no-verify", plain / "model-00001-of-00009.safetensors", tmp_path / "one")
    assert not (tmp_path / "one" / "tokenizer.json").exists()


def test_what_is_left_out_is_named(tmp_path, plain):
    for name in ("additional_chat_templates", "1_Pooling", ".cache"):
        (plain / name).mkdir()
    (plain / "vocab.json").symlink_to("../blobs/deleted")
    (plain / ".hidden").symlink_to("deleted")
    for name in ("pytorch_model.bin", "model.fp16.safetensors"):
        (plain / name).write_bytes(b"weights")
    with open(plain / "imatrix.dat", "wb") as file:
        file.truncate(200 * 2**20)
    notice = (
        f"In {plain}, neither read nor copied: 1_Pooling, additional_chat_templates, imatrix.dat, "
        "model.fp16.safetensors, pytorch_model.bin, vocab.json\n"
    )
    assert notice in run("compress", plain, tmp_path / "native")
    assert "copied" not in run("decompress", tmp_path / "native", tmp_path / "back")
    (tmp_path / "native" / "onnx").mkdir()
    assert "native, neither read nor copied: onnx\n" in run(
        "decompress", tmp_path / "native", tmp_path / "b"
    )
    assert "copied" not in run("compress", plain, tmp_path / "orbax", "--format", "orbax")
    shard = plain / "model-00001-of-00009.safetensors"
    assert "copied" not in run("compress", shard.rename(plain / "blob"), tmp_path / "one")


def test_one_checkpoint_alone(tmp_path, plain):
    run("compress", plain, tmp_path / "native")
    assert "17 tensors" in (output := run("verify", tmp_path / "native"))
    assert "all checksums are right" in output
    for path in (plain, PUBLISHED):
        assert "this format has no checksums" in run("verify", path)
    shard = max((tmp_path / "native").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    assert f"{shard}: " in (output := run("verify", tmp_path / "native", status=2))
    assert "is corrupt" in output


def test_published_checkpoints(tmp_path):
    assert "All 21 tensors" in run("verify", ORIGINAL, PUBLISHED)
    run("compress", PUBLISHED, tmp_path / "native")
    run("decompress", PUBLISHED, tmp_path / "plain")
    assert "dfloat11_config" not in (tmp_path / "plain" / "config.json").read_text()
    run("compress", ORIGINAL, tmp_path / "published", "--format", "published")
    for path in ("native", "plain", "published"):
        assert "bit-identical" in run("verify", ORIGINAL, tmp_path / path)
        assert "bit-identical" in run("verify", tmp_path / path, PUBLISHED)
    run("compress", tmp_path / "native", tmp_path / "again", "--format", "published")
    for file in (tmp_path / "published").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_published_checkpoints_of_an_unknown_model_type(tmp_path, plain):
    message = "no default pattern dict for the model type 'mystery'"
    (plain / "config.json").write_text('{"model_type": "mystery"}')
    (plain / "tokenizer.model").write_text("tokens")
    target = tmp_path / "published"
    command = ("compress", plain, target, "--format", "published")
    assert message in run(*command, status=2)
    assert not target.exists()

    units = {r"model\.layers\.\d+\.mlp": ["up_proj"], r"model\.embed_tokens": []}
    for patterns in (units, {"dfloat11_config": {"pattern_dict": units}}):
        (tmp_path / "units.json").write_text(json.dumps(patterns))
        target = tmp_path / f"published {len(patterns)}"
        run(*command[:2], target, *command[3:], "--pattern-dict", tmp_path / "units.json")
        assert (target / "tokenizer.model").read_text() == "tokens"
        assert "its shape in the model is not known" in run("info", target, status=2)
        assert "bit-identical" in run("verify", plain, target, "--shapes", plain)
        native = tmp_path / f"native {len(patterns)}"
        run("compress", target, native, "--shapes", plain)
        assert "bit-identical" in run("verify", plain, native)

    for key in ("dfloat11_config", "pattern_dict"):
        (tmp_path / "units.json").write_text(json.dumps({key: 3}))
        output = run(*command, "--pattern-dict", tmp_path / "units.json", status=2)
        assert f"units.json: {key} is 3, expected a JSON object" in output


def test_info(tmp_path, plain, weights):
    lines = run("info", plain).splitlines()
    assert lines[0] == f"{plain}: plain checkpoint of the model type llama"
    (layers,) = (line for line in lines if "model.layers.*.mlp.up_proj.weight" in line)
    assert layers.replace("│", " ").split() == (
        "model.layers.*.mlp.up_proj.weight x 3 192x128 BF16 plain 144 KiB 144 KiB 100.0".split()
    )
    assert lines[-1].startswith("17 tensors, ")

    run("compress", plain, tmp_path / "native")
    summary = json.loads(run("info", tmp_path / "native", "--json"))
    assert summary["format"] == "native" and summary["model_type"] == "llama"
    assert summary["tensors"] == len(weights)
    assert summary["weights"] == sum(array.size for array in weights.values())
    assert summary["nbytes_before"] == sum(array.nbytes for array in weights.values())
    groups = {group["pattern"]: group for group in summary["groups"]}
    assert sum(group["nbytes"] for group in groups.values()) == summary["nbytes"]
    layers = groups["model.layers.*.mlp.up_proj.weight"]
    assert layers["count"] == 3 and layers["shape"] == [192, 128]
    assert layers["format"] == "native" and layers["nbytes"] < 0.75 * layers["nbytes_before"]
    assert groups["model.layers.*.input_layernorm.weight"]["format"] == "plain"


def test_info_shows_names_as_they_are(tmp_path):
    weights = {"[bold]name[/bold]": np.zeros(1, np.float32), "a/0/b": np.zeros(1, np.float32)}
    output = run("info", model_files.write_model(tmp_path / "plain", weights))
    assert "[bold]name[/bold]" in output and "a/*/b" in output


def test_differences(tmp_path, plain, weights):
    changed = weights["odd"].copy()
    changed.view(np.uint16)[3, 4] ^= 1
    other = model_files.write_model(tmp_path / "other", weights | {"odd": changed})
    output = run("verify", plain, other, status=1)
    assert "the checkpoints differ:\nodd[3, 4] is 0x" in output


@pytest.mark.parametrize("format_", ["native", "orbax"])
def test_nothing_to_gain(tmp_path, format_):
    small = {"a": np.zeros(16_383, np.float32)}
    of_many_dimensions = {"a": np.zeros((128, 128, *[1] * 7), BFLOAT16)}
    for i, tensors in enumerate((small, of_many_dimensions)):
        path = model_files.write_model(tmp_path / f"{i}", tensors)
        output = run("compress", path, tmp_path / f"out {i}", "--format", format_)
        assert "Nothing got smaller: only bfloat16 tensors of 16,384 weights and more, " in output
        assert "and of up to 8 dimensions, do." in output
    path = model_files.write_model(tmp_path / "plain", model_files.tensors())
    output = run("compress", path, tmp_path / "compressed", "--format", format_)
    assert "Nothing got smaller" not in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("info", "nothing"), "nothing: does not exist"),
        (("verify", "plain", "nothing"), "nothing: does not exist"),
        (("verify", "plain", "truncated.safetensors"), "is not a safetensors file"),
        (("compress", "plain", "plain"), "plain: exists already, and is not empty"),
        (("compress", "plain", "out.safetensors"), "is a name for a file"),
        (("decompress", "plain", "out"), "plain: is not compressed"),
        (("compress", "native", "out"), "native: is in the native format already"),
        (("compress", "plain", "out", "--format", "nonsense"), "'nonsense' is not one of"),
        (("compress", "plain", "out", "--pattern-dict", "p.json"), "'p.json' does not exist"),
        (("compress", "plain"), "Missing argument 'DST'"),
    ],
)
def test_wrong_use_ends_in_one_line(tmp_path, plain, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truncated.safetensors").write_bytes(b"123")
    if "native" in args:
        run("compress", "plain", "native")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    output = run(*args, status=2)
    assert message in output and "Traceback" not in output
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("compress", "df11_jax.checkpoints.convert.encode"),
        ("decompress", "df11_jax._host_codec.decode"),
        ("compress --format published", "df11_jax.published._unit_files.encode_unit"),
    ],
)
def test_killed_and_resumed(tmp_path, plain, command, function):
    original = source = ORIGINAL if "published" in command else plain
    if command == "decompress":
        source = tmp_path / "native"
        run("compress", plain, source)
    target = tmp_path / "target"
    args = (*command.split(), source, target)
    killed = process(die(function, "SIGKILL"), *args)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = {file: file.stat().st_ino for file in target.glob("*.safetensors")}
    assert finished
    assert "is incomplete" in run("verify", original, target, status=2)
    assert "of another job" in run("decompress", PUBLISHED, target, status=2)

    resumed = process("", *args)
    assert resumed.returncode == 0, resumed.stderr
    assert {file: file.stat().st_ino for file in finished} == finished
    assert not list(target.glob("*.partial"))
    assert "bit-identical" in run("verify", original, target)


def test_interrupted_and_resumed(tmp_path, plain):
    target = tmp_path / "target"
    function = "df11_jax.checkpoints.convert.encode"
    stopped = process(die(function, "SIGINT"), "compress", plain, target)
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines() == [
        "Error: interrupted",
        f"{target} is not complete; the same command goes on from there.",
    ]
    assert list(target.glob("*.safetensors")) and not list(target.glob("*.partial"))
    assert process("", "compress", plain, target).returncode == 0
    assert "bit-identical" in run("verify", plain, target)


def test_a_full_disk(tmp_path, plain):
    target = tmp_path / "target"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    full = process(limit, "compress", plain, target)
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    assert re.search(r"\.safetensors\.\w{8}\.partial: File too large\n", full.stderr)
    assert "the same command goes on from there" in full.stderr
    assert not list(target.glob("*.partial"))
    assert process("", "compress", plain, target).returncode == 0
    assert "bit-identical" in run("verify", plain, target)


def test_says_what_to_install():
    # As where neither click nor rich is installed.
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("click", "rich") else find(name)
from df11_jax.cli import main
main()
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == (
        'df11-jax needs click, rich. Install with: pip install "df11_jax[cli]"\n'
    )


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["demo"], "demo"),
        (["fit", "nothing", "--memory", "24GB"], "flax"),
        (["generate", ".", "--prompt", "x"], "models"),
        (["compare", "--memory", "24GB"], "models"),
    ],
)
def test_says_what_to_install_for_models(arguments, extra):
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "flax" else find(name)
sys.modules["flax"] = None  # cannot be imported
"""
    ended = process(program, *arguments)
    assert ended.returncode == 2
    assert ended.stderr == (f'df11-jax needs flax. Install with: pip install "df11_jax[{extra}]"\n')


@pytest.mark.parametrize("module", ["linen", "nnx", "models"])
def test_modules_say_what_to_install(module):
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "flax" else find(name)
sys.modules["flax"] = None
"""
    code = f"{program}import df11_jax.{module}"
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert f"ImportError: df11_jax.{module} needs flax. Install with: pip install" in ended.stderr


def test_orbax_without_its_checkpoints():
    # As where another of Orbax's packages is installed alone.
    code = "import orbax; orbax.__path__ = []; import df11_jax.orbax"
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "ImportError: df11_jax.orbax needs orbax-checkpoint. Install with: pip" in ended.stderr


def test_generate_downloads_nothing():
    output = run("generate", "Qwen/Qwen3-0.6B", "--prompt", "x", status=2)
    assert "hf download" in output


def test_without_arguments():
    result = process("")
    assert result.returncode == 2
    assert "\nCommands:\n" in result.stderr and "\\n" not in result.stderr


def test_a_temperature_that_is_none():
    result = process("", "demo", "--temperature", "nan")
    assert result.returncode == 2
    assert "nan is not finite" in result.stderr


def test_an_orbax_checkpoint_at_a_link_to_nothing(tmp_path, plain):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert "is a link to nothing" in run("compress", plain, link, "--format=orbax", status=2)
    assert not (tmp_path / "nowhere").exists()


def test_help(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["df11-jax", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    for command in ("info", "compress", "decompress", "verify"):
        assert "Usage" in run(command, "--help")


def test_published_file_without_config(tmp_path):
    shard = tmp_path / "layer.safetensors"
    shard.write_bytes((PUBLISHED / "model_layers_0.safetensors").read_bytes())
    assert "--pattern-dict" in run("info", shard, status=2)
    options = ["--shapes", ORIGINAL, "--pattern-dict", PUBLISHED / "config.json"]
    assert "model.layers.*.mlp.up_proj.weight" in run("info", shard, *options)
    run("compress", shard, tmp_path / "native", *options)
    assert "bit-identical" in run("verify", shard, tmp_path / "native", *options)


def test_file_of_a_model_uses_the_config_beside_it(tmp_path):
    file = ORIGINAL / "model.safetensors"
    assert "model type llama" in run("info", file)
    run("compress", file, tmp_path / "published", "--format", "published")
    assert "bit-identical" in run("verify", ORIGINAL, tmp_path / "published")


def test_a_file_in_and_a_file_out(tmp_path, plain, weights):
    file = model_files.write_model(tmp_path / "one", weights) / "model.safetensors"
    native, back = tmp_path / "native.safetensors", tmp_path / "back.safetensors"
    assert "native.safetensors: native, 17 tensors" in run("compress", file, native)
    assert "back.safetensors: plain, 17 tensors" in run("decompress", native, back)
    for path in (native, back):
        assert "bit-identical" in run("verify", file, path)
    for format_ in ("published", "orbax"):
        output = run("compress", file, tmp_path / "x.safetensors", "--format", format_, status=2)
        assert "is a name for a file" in output
    assert "exists already" in run("compress", file, native, status=2)


def test_what_another_command_left_is_not_said_to_go_on(tmp_path, plain):
    target = tmp_path / "target"
    process(die("df11_jax.checkpoints.convert.encode", "SIGKILL"), "compress", plain, target)
    (plain / "tokenizer.json").write_text("{ }")
    output = run("compress", plain, target, status=2)
    assert output == (
        f"Error: {target}: is what an interrupted run left behind, but of another job or from "
        "files that have changed since (files that changed: tokenizer.json). Nothing was changed; "
        "delete the directory to start anew\n"
    )


def test_quantized_models_do_not_get_smaller(tmp_path):
    weights = {"up_proj.qweight": np.zeros((300, 300), np.int32)}
    path = model_files.write_model(tmp_path / "plain", weights)
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    output = run("compress", path, tmp_path / "native")
    assert "the model is quantized already ('awq')." in output
