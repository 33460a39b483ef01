"""`df11-jax fit`: its answers, exit codes and messages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import jax
import model_files
import numpy as np
import pytest
from click.testing import CliRunner
from known_configs import KNOWN

import df11_jax
from df11_jax import checkpoints, models
from df11_jax.cli import _commands
from df11_jax.models.budget import FRACTION_VARIABLES

LLAMA_3_1_8B = KNOWN["Llama-3.1-8B"]
PUBLISHED = Path(__file__).parents[1] / "published" / "fixtures" / "tiny_llama" / "sharded"
FITS, WRONG, DOES_NOT_FIT = 0, 2, 3


@pytest.fixture(autouse=True)
def no_fraction(monkeypatch):
    for name in FRACTION_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def llama(tmp_path):
    return write_config(tmp_path / "llama", LLAMA_3_1_8B)


def write_config(path, fields):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    return path


def run(*args, status=FITS):
    result = CliRunner().invoke(_commands.commands, ["fit", *map(str, args)])
    assert result.exit_code == status, result.output
    return result.output


def ask(*args, status=FITS):
    return json.loads(run(*args, "--json", status=status))


def test_directory_and_its_config_are_answered_alike(llama):
    answer = ask(llama, "--memory", "24GiB")
    assert answer == ask(llama / "config.json", "--memory", "24GiB")
    assert answer["parameters"] == 8_030_261_248
    assert (answer["format"], answer["exact"], answer["context"]) == ("config", False, 8192)
    plain, compressed = answer["plain"], answer["compressed"]
    for need, compress in ((plain, False), (compressed, True)):
        memory = models.estimate_memory(
            models.read_config(LLAMA_3_1_8B), batch=1, context=8192, compress=compress
        )
        assert (need["weights"], need["cache"]) == (memory.weights, memory.cache)
        assert need["total"] == memory.peak
        assert need["free"] == answer["usable"] - need["total"]
        assert need["temporary"] == sum(answer["temporary"].values())
    assert plain["weights"] == 16_060_522_496
    assert answer["usable"] == 18 * 2**30


@pytest.mark.parametrize("batch", [1, 3])
def test_longest_context_and_largest_batch_are_just_what_fits(llama, batch):
    answer = ask(llama, "--memory", "24GB", "--batch", batch, "--context", 4096)
    need = answer["compressed"]
    longest, largest = need["longest_context"], need["largest_batch"]
    size = ("--memory", "24GB", "--context", 4096)
    assert ask(llama, *size, "--batch", largest)["compressed"]["fits"]
    assert not ask(llama, *size, "--batch", largest + 1, status=3)["compressed"]["fits"]
    size = ("--memory", "24GB", "--batch", batch)
    assert ask(llama, *size, "--context", longest)["compressed"]["fits"]
    ask(llama, *size, "--context", longest + 1, status=DOES_NOT_FIT)


def test_table(llama):
    output = run(llama, "--memory", "14GiB", "--context", 2048, status=DOES_NOT_FIT)
    assert "plain: does not fit\n" in output
    assert "compressed: does not fit" in output
    assert "XLA_CLIENT_MEM_FRACTION=0." in output
    assert "XLA allocates 10.5 GiB, 75% of the 14 GiB of a device (by default" in output
    assert "about 10.01 GiB" in output and "10.6 to 10.8" in output
    output = run(llama, "--memory", "24GiB", "--batch", 2)
    assert "cache of 8,192 tokens x 2" in output and "compressed: fits" in output
    assert "largest batch" in output and "each device" not in output


def test_devices(tmp_path):
    path = write_config(tmp_path / "70b", KNOWN["Llama-3.1-70B"])
    assert "longest context" in run(path, "--memory", "80GiB", status=DOES_NOT_FIT)
    output = run(path, "--memory", "80GiB", "--devices", 2)
    assert "of each device" in output and "each of 2 devices" in output
    each = ask(path, "--memory", "80GiB", "--devices", 2)
    assert each["devices"] == 2
    assert not each["plain"]["fits"] and each["compressed"]["fits"]
    # Half of them, and all norms.
    norms = 2 * (2 * 80 + 1) * 8192
    assert each["plain"]["weights"] == (2 * 70_553_706_496 + norms) // 2
    output = run(path, "--memory", "80GiB", "--devices", 4, "--stages", 2)
    assert "each of 4 devices in 2 stages" in output
    output = run(path, "--memory", "80GiB", "--devices", 3, status=WRONG)
    assert "cannot be divided among 3 devices: expected 1 or 2 or 4 or 8" in output


def test_fraction_of_the_memory(llama, monkeypatch):
    need = ask(llama, "--memory", "14GiB", "--context", 2048, status=DOES_NOT_FIT)["compressed"]
    assert 0.75 < need["fraction_needed"] < 0.95
    for name, fraction in zip(reversed(FRACTION_VARIABLES), ("0.8", "0.9"), strict=True):
        monkeypatch.setenv(name, fraction)
        answer = ask(llama, "--memory", "14GiB", "--context", 2048)
        assert answer["fraction"] == float(fraction) and answer["compressed"]["fits"]
    assert "90% of the 14 GiB of a device (by its environment" in run(llama, "--memory", "14GiB")
    for wrong in ("much", "0", "1.5", "nan"):
        monkeypatch.setenv(FRACTION_VARIABLES[0], wrong)
        output = run(llama, "--memory", "14GiB", status=WRONG)
        assert f"XLA_CLIENT_MEM_FRACTION is {wrong!r}, expected a fraction" in output


def test_fits_only_if_weights_compress_as_expected(llama):
    total = ask(llama, "--memory", "24GiB")["compressed"]["total"]
    memory = -(-(total + 1000) * 4 // 3)
    assert "fits, but not if weights take the most that they may" in run(llama, "--memory", memory)


@pytest.mark.parametrize(
    "text", ["", "GB", "24XB", "24iB", "-1GB", "0GB", "0.9", "1e3", "2 4GB", "nan", "9" * 400]
)
def test_what_is_no_size_of_memory(llama, text):
    output = run(llama, f"--memory={text}", status=WRONG)
    assert "is no memory size: expected one such as 24GB" in output


def test_memory_without_a_unit(llama):
    output = run(llama, "--memory=24", status=WRONG)
    assert "'24' is 24 bytes: expected a unit, as in 24GB" in output


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="is about machines without a GPU")
def test_memory_must_be_given_without_a_gpu(llama):
    output = run(llama, status=WRONG)
    assert "is no GPU that tells its memory" in output and "--memory 24GB" in output


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device that JAX sees")
def test_memory_of_the_gpu(llama):
    answer = ask(write_config(llama / "inner", families.CONFIGS["qwen3"]))
    assert answer["device"] == jax.devices()[0].device_kind
    limit = jax.devices()[0].memory_stats()["bytes_limit"]
    assert abs(answer["usable"] - limit) <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        (LLAMA_3_1_8B | {"hidden_size": "big"}, "config.json: hidden_size is 'big'"),
        ([], "config.json: expected a JSON object"),
    ],
)
def test_configurations_that_are_not_understood(tmp_path, fields, message):
    path = write_config(tmp_path / "model", fields)
    for given in (path, path / "config.json"):
        assert message in run(given, "--memory", "1GB", status=WRONG)


def test_other_errors(tmp_path, llama):
    missing = run(tmp_path / "nothing", "--memory", "1GB", status=WRONG)
    assert "nothing: does not exist" in missing and "config.json is all that is needed" in missing
    (tmp_path / "empty").mkdir()
    assert "expected model.safetensors" in run(tmp_path / "empty", "--memory", "1G", status=WRONG)
    long = run(llama, "--memory", "24GB", "--context", 131_073, status=WRONG)
    assert "the model was made for 131072 positions" in long
    for option in ("--batch", "--devices", "--context"):
        run(llama, "--memory", "24GB", option, 0, status=WRONG)


def test_brackets_in_a_path_are_not_taken_for_a_style(tmp_path):
    path = write_config(tmp_path / "[bold]model[0]", LLAMA_3_1_8B)
    assert f"{path}/config.json: llama" in run(path, "--memory", "24GiB")


def test_short_models_have_a_short_default(tmp_path):
    path = write_config(tmp_path / "model", KNOWN["Qwen3-14B"] | {"max_position_embeddings": 1000})
    assert ask(path, "--memory", "80GB")["context"] == 1000
    assert ask(path, "--memory", "80GB")["compressed"]["longest_context"] == 1000


def test_plain_weights_change_nothing_about_what_the_configuration_tells(tmp_path):
    path = families.write_family(tmp_path / "model", "gemma3_text", shards=2)
    alone = ask(path / "config.json", "--memory", "1GB")
    answer = ask(path, "--memory", "1GB")
    assert answer["format"] == "plain" and alone["format"] == "config"
    assert answer | {"format": "", "model": ""} == alone | {"format": "", "model": ""}


def test_native_checkpoint_takes_what_its_headers_say(tmp_path):
    fields = families.CONFIGS["llama"] | {"hidden_size": 256, "vocab_size": 1000}
    source = models.RandomSource(models.read_config(fields))
    tensors = {name: source.read(name) for name in source.tensors}
    # Not of the decoder, and not loaded.
    tensors["vision_tower.weight"] = np.zeros((256, 256), tensors["model.norm.weight"].dtype)
    plain = families.write_directory(tmp_path / "plain", fields, tensors)
    result = CliRunner().invoke(_commands.commands, ["compress", str(plain), str(tmp_path / "it")])
    assert result.exit_code == 0, result.output
    leaves = {
        name: leaf
        for name, leaf in checkpoints.load(tmp_path / "it").items()
        if not name.startswith("vision")
    }
    report = df11_jax.size_report(leaves)
    assert any(leaf.compressed for leaf in report.leaves)
    answer = ask(tmp_path / "it", "--memory", "1GB")
    need = answer["compressed"]
    assert answer["exact"] and answer["only_weights"] is None and answer["format"] == "native"
    assert need["weights"] == need["weights_least"] == need["weights_most"]
    # As they are loaded, layers have arrays as long as the longest.
    assert 0 <= report.nbytes - need["weights"] < 0.001 * report.nbytes
    assert answer["plain"]["weights"] == report.nbytes_before
    assert need["longest_context"] == 512
    assert "as the native checkpoint has them, by its headers" in run(
        tmp_path / "it", "--memory", "1GB"
    )


def test_saved_parameters_take_what_their_headers_say(tmp_path):
    directory = families.write_family(tmp_path / "model", "llama")
    model = models.load(directory)
    checkpoints.save(model.params, tmp_path / "saved")
    shutil.copy(directory / "config.json", tmp_path / "saved")
    answer = ask(tmp_path / "saved", "--memory", "1GB")
    assert answer["exact"] and answer["only_weights"] is None
    report = df11_jax.size_report(model.params)
    assert answer["compressed"]["weights"] == report.nbytes
    assert answer["plain"]["weights"] == report.nbytes_before
    assert answer["parameters"] == ask(directory, "--memory", "1GB")["parameters"]
    plain = models.load(directory, compress=False)
    checkpoints.save(plain.params, tmp_path / "plain")
    shutil.copy(directory / "config.json", tmp_path / "plain")
    estimated = ask(tmp_path / "plain", "--memory", "1GB") | {"format": "", "model": ""}
    assert estimated == ask(directory, "--memory", "1GB") | {"format": "", "model": ""}


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_what_devices_shared_when_saved_counts_once(tmp_path):
    directory = families.write_family(tmp_path / "model", "llama")  # with two key-value heads
    saved = {}
    for devices in (1, 4):
        params = models.load(directory, devices=devices).params
        checkpoints.save(params, tmp_path / f"saved{devices}")
        shutil.copy(directory / "config.json", tmp_path / f"saved{devices}")
        saved[devices] = df11_jax.size_report(params).nbytes
    for devices in (1, 2, 4):
        options = ("--memory", "1GB", "--devices", devices)
        one, four = (ask(tmp_path / f"saved{n}", *options) for n in saved)
        assert one["exact"] and four["exact"]
        assert four["plain"] == one["plain"]
    # Four devices have what was saved for four; norms are on all of them.
    assert four["compressed"]["weights"] == pytest.approx(saved[4] / 4, rel=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_wide_checkpoints_are_taken_to_be_rounded(tmp_path, dtype):
    name, source = np.dtype(dtype).name, families.source_of("llama")
    bfloat16 = {name: source.read(name) for name in source.tensors}
    wide = {name: tensor.astype(dtype) for name, tensor in bfloat16.items()}
    fields = families.CONFIGS["llama"]
    narrow_path = families.write_directory(tmp_path / "narrow", fields, bfloat16)
    path = families.write_directory(tmp_path / "wide", fields | {"dtype": name}, wide)
    narrow = ask(narrow_path, "--memory", "1GB")
    assert (narrow["wide"], narrow["rounded"]) == ([], False)
    assert "rounded" not in run(narrow_path, "--memory", "1GB")
    for given in (path, path / "config.json"):
        answer = ask(given, "--memory", "1GB")
        assert (answer["wide"], answer["rounded"]) == ([name], True)
        for column in ("plain", "compressed"):
            assert answer[column] == narrow[column]
        assert f"The model is {name}. All figures are those of weights rounded to bfloat16" in run(
            given, "--memory", "1GB"
        )


def test_published_checkpoint():
    answer = ask(PUBLISHED, "--memory", "1GB")
    source = checkpoints.open_checkpoint(PUBLISHED)
    assert answer["format"] == "published" and answer["exact"]
    stored = sum(info.stored_nbytes for info in source.tensors.values())
    assert answer["compressed"]["weights"] == stored
    assert "Loaded, they become native" in run(PUBLISHED, "--memory", "1GB")


def test_orbax_checkpoint(tmp_path):
    tensors = {"w": model_files.random_weights((256, 256), 0)}
    plain = model_files.write_model(tmp_path / "plain", tensors)
    args = ["compress", str(plain), str(tmp_path / "orbax"), "--format", "orbax"]
    result = CliRunner().invoke(_commands.commands, args)
    assert result.exit_code == 0, result.output
    leaf = checkpoints.load(tmp_path / "orbax")["w"]
    answer = ask(tmp_path / "orbax", "--memory", "1GB")
    assert answer["compressed"]["weights"] == leaf.compressed_nbytes
    assert "config.json" in answer["only_weights"]


def test_only_weights_of_models_that_cannot_be_run(tmp_path):
    tensors = {
        "blocks.0.w": model_files.random_weights((512, 256), 0),
        "blocks.0.b": np.zeros(100, np.float32),
    }
    path = model_files.write_model(tmp_path / "mamba", tensors)
    (path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    answer = ask(path, "--memory", "1MB")
    assert answer["parameters"] == 512 * 256 + 100
    assert answer["plain"]["weights"] == answer["plain"]["total"] == 2 * 512 * 256 + 400
    assert not answer["exact"] and answer["temporary"] is None
    assert answer["compressed"]["weights"] < 0.69 * answer["plain"]["weights"]
    assert answer["compressed"]["longest_context"] is None
    assert "'mamba' is not supported" in answer["only_weights"]
    assert (answer["wide"], answer["rounded"]) == (["float32"], False)
    output = run(path, "--memory", "1MB")
    assert "Only weights are known" in output and "cache of" not in output
    assert "Weights that are float32 count as they are, not compressed" in output
    assert "compressed, weights alone: fits" in output
    run(path, "--memory", "200kB", status=DOES_NOT_FIT)
    # One file, beside a config.json, without one, and beside that of another model.
    file = path / "model.safetensors"
    assert "mamba" in run(file, "--memory", "1MB")
    (path / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    assert "tensors are missing" in run(path, "--memory", "1MB")
    (path / "config.json").unlink()
    assert "has no config.json" in run(path, "--memory", "1MB")


def test_tensors_of_other_shapes_than_the_configuration_says(tmp_path):
    path = families.write_family(tmp_path / "model", "llama")
    parameters = ask(path, "--memory", "1GB")["parameters"]
    (path / "config.json").write_text(
        json.dumps(families.CONFIGS["llama"] | {"intermediate_size": 1600})
    )
    answer = ask(path, "--memory", "1GB")
    assert "expected shape [64, 1600], got [64, 160]" in answer["only_weights"]
    assert answer["parameters"] == parameters and answer["temporary"] is None


def test_it_starts_no_device_and_compiles_nothing(llama):
    code = f"""
import atexit, sys
def check():
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    print("checked", file=sys.stderr)
atexit.register(check)
sys.argv[1:] = ["fit", {str(llama)!r}, "--memory", "24GiB"]
from df11_jax.cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
    )
    assert result.returncode == FITS, result.stderr
    assert result.stderr == "checked\n"
    assert "compressed: fits" in result.stdout
