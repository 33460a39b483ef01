"""`df11-jax compare`, at a size that takes seconds."""

import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

import families
import jax
import matplotlib
import pytest
import shapes
from click.testing import CliRunner

from df11_jax import models
from df11_jax.bench import compare, one_way, placements, plan, request
from df11_jax.cli import _commands

SIZES = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SHORT = ["--batch", 1, "--prompt-length", 8, "--tokens", 4]
NAMES = ["compressed", "plain", "offloaded"]


def invoke(*arguments):
    return CliRunner().invoke(_commands.commands, ["compare", *map(str, arguments)])


def read(result):
    """The events in JSON output, those of each kind together."""
    found = {}
    for line in result.stdout.splitlines():
        event = json.loads(line)
        found.setdefault(event["event"], []).append(event)
    return found


@pytest.fixture
def in_process(monkeypatch):
    """Measures in this process, where what is measured can be changed."""

    def events(task, way):
        found = []
        one_way.measure(task, found.append)
        return found

    monkeypatch.setattr(compare, "_events", events)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    (path / "config.json").write_text(json.dumps(SIZES))
    return path


@pytest.fixture(scope="module")
def report(folder):
    """Of a run in which everything fits, in processes of their own."""
    matplotlib.use("agg")
    options = ["--memory", "1GB", "--json", "--plot", folder / "compared.png"]
    result = invoke(folder / "config.json", *SHORT, "--batch", 3, *options)
    assert result.exit_code == 0, result.output
    assert (folder / "compared.png").stat().st_size > 1000
    return read(result)


@pytest.mark.slow
def test_weights_in_three_placements(report):
    assert [weights["weights"] for weights in report["weights"]] == NAMES
    compressed, plain, offloaded = report["weights"]
    assert compressed["device_bytes"] < 0.75 * plain["device_bytes"]
    assert plain["host_layers"] == plain["host_bytes"] == compressed["host_bytes"] == 0
    assert offloaded["device_bytes"] + offloaded["host_bytes"] == plain["device_bytes"]
    # No more layers than needed.
    left = compressed["device_bytes"] - offloaded["device_bytes"]
    assert 0 <= left < offloaded["host_bytes"] / offloaded["host_layers"]


@pytest.mark.slow
def test_rows(report):
    (start,) = report["start"]
    assert start["device"]["platform"] == jax.default_backend()
    assert (start["prompt"], start["tokens"], start["budget"]) == (8, 4, 750_000_000)
    order = [(row["xla"], row["weights"], row["batch"]) for row in report["row"]]
    assert order == [("default", name, batch) for name in NAMES for batch in (1, 3)]
    device_bytes = {weights["weights"]: weights["device_bytes"] for weights in report["weights"]}
    for row in report["row"]:
        assert row["not_run"] is None
        assert row["plan"]["peak"] == max(row["plan"]["prefill"], row["plan"]["decode"])
        assert row["plan"]["peak"] > device_bytes[row["weights"]]
        assert 1 <= len(row["prefill_seconds"]) == len(row["decode_seconds"]) <= 3
        assert bool(row["decompress_seconds"]) == (row["weights"] == "compressed")
        rate = 3 * row["batch"] / statistics.median(row["decode_seconds"])
        assert row["tokens_per_second"] == pytest.approx(rate)
        rate = 8 * row["batch"] / statistics.median(row["prefill_seconds"])
        assert row["prompt_tokens_per_second"] == pytest.approx(rate)


@pytest.mark.slow
def test_all_placements_generate_the_same(report):
    (summary,) = report["summary"]
    assert summary["equal"] == {"1": NAMES, "3": NAMES}
    assert summary["differences"] == []


@pytest.mark.slow
def test_a_cpu_has_one_way(report):
    (left_out,) = report["left out"]
    assert left_out["xla"] == "cublas"
    assert "is for GPUs" in left_out["why"]


@pytest.mark.slow
def test_the_other_way_without_what_is_left_out(folder):
    options = ["--without", "default", "--without", "plain", "--memory", "1GB", "--json"]
    found = read(invoke(folder / "config.json", *SHORT, *options, "--without", "longest"))
    assert [(row["xla"], row["weights"]) for row in found["row"]] == [("cublas", "compressed")]
    assert found["summary"][0]["longest"] == {}


@pytest.mark.parametrize(
    "without",
    [
        ["default", "cublas"],
        ["compressed", "exact", "plain", "offloaded"],
        ["default", "compressed", "plain"],
    ],
)
def test_nothing_is_left_to_measure(folder, without):
    result = invoke(folder / "config.json", *(f"--without={part}" for part in without))
    assert result.exit_code == 2
    assert "--without leaves out everything" in result.stderr


def test_each_way_has_xla_flags_of_its_own(monkeypatch):
    monkeypatch.setattr(compare, "_COMMAND", [sys.executable, "-c", PRINT_FLAGS])
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_enable_triton_gemm=false")
    flags = {way: next(compare._events(TASK, way))["flags"] for way in compare.WAYS}
    assert flags["default"] == "--xla_a=1"
    assert flags["cublas"] == "--xla_a=1 --xla_gpu_enable_triton_gemm=false"


def test_an_interrupt_of_the_terminal_is_for_this_process_alone(monkeypatch, capfd):
    monkeypatch.setattr(compare, "_COMMAND", [sys.executable, "-c", INTERRUPT])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert [event["event"] for event in compare._events(TASK, "default")] == ["alive"]
    assert "Traceback" not in capfd.readouterr().err
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


PRINT_FLAGS = "import json, os; print(json.dumps({'flags': os.environ['XLA_FLAGS']}))"
INTERRUPT = """
import json, os, signal
os.kill(os.getpid(), signal.SIGINT)
print(json.dumps({"event": "alive"}))
"""
TASK = one_way.Task(None, (), 8, 4, None, NAMES, longest=False, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_loses_no_row_and_leaves_no_process(folder, number):
    # A job in the background ignores it, and so would what it starts.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from df11_jax.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, "compare", folder / "config.json", "--json"]
    command += ["--prompt-length", "8", "--tokens", "4"]
    command += [option for batch in range(1, 60) for option in ("--batch", str(batch))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if lines[-1]["event"] == "row" and process.poll() is None:
                children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
                (child,) = children.read_text().split()
                process.send_signal(number)
                break
        lines += map(json.loads, process.stdout)
        assert process.wait() == (130 if number == signal.SIGINT else -number)
    assert lines[-1]["event"] == ("summary" if number == signal.SIGINT else "row")
    while is_running(child):
        time.sleep(0.1)


def is_running(pid):
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_what_fits_any_budget(report):
    assert report["summary"][0]["longest"] == dict.fromkeys(NAMES, 128)


@pytest.mark.slow
def test_a_budget_between_compressed_and_plain(report, folder, monkeypatch, in_process):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")  # of the memory, so it is twice the budget
    peaks = {row["weights"]: row["plan"]["peak"] for row in report["row"] if row["batch"] == 1}
    between = f"{(peaks['compressed'] + peaks['plain']) / 1e6:.6f}MB"
    plot = folder / "between.png"
    options = ["--memory", between, "--plot", plot, "--without", "offloaded"]
    result = invoke(folder / "config.json", *SHORT, *options)
    assert result.exit_code == 0, result.output
    assert re.search(r" plain +1 +does not fit +\d+\.\d MB$", result.stdout, re.MULTILINE)
    assert re.search(r" compressed +1 +\d+\.\d +\d+\.\d\d ", result.stdout, re.MULTILINE)
    assert re.search(r"^  compressed: (64|128) tokens", result.stdout, re.MULTILINE)
    assert plot.stat().st_size > 1000


@pytest.mark.slow
def test_a_directory_of_a_tied_model_that_does_not_fit(tmp_path, in_process):
    path = families.write_family(tmp_path / "model", "qwen2")
    result = invoke(path, *SHORT, "--memory", "0.01MB", "--json")
    assert result.exit_code == 0, result.output
    report = read(result)
    assert report["start"][0]["model"] == str(path)
    assert [row["not_run"] for row in report["row"]] == ["does not fit"] * 3
    assert report["row"][0]["tokens_per_second"] is None
    assert report["summary"][0]["longest"] == dict.fromkeys(NAMES, 0)
    assert report["summary"][0]["equal"] == {}


@pytest.mark.slow
def test_different_tokens_end_with_status_1(folder, monkeypatch, in_process):
    decompress_params = placements.decompress_params

    def wrong(params):
        plain = decompress_params(params)
        return plain | {"norm": -plain["norm"]}

    monkeypatch.setattr(placements, "decompress_params", wrong)
    result = invoke(folder / "config.json", *SHORT, "--memory", "1GB")
    assert result.exit_code == 1
    assert "DIFFERENT: batch 1: tokens, first logits, last logits of plain and" in result.stdout


@pytest.mark.slow
def test_device_that_runs_out_of_memory(folder, monkeypatch, in_process):
    run = one_way.run

    def exhausted(programs, params, *rest):
        if "host_layers" not in params and isinstance(params["lm_head"], jax.Array):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return run(programs, params, *rest)

    monkeypatch.setattr(one_way, "run", exhausted)
    result = invoke(folder / "config.json", *SHORT, "--memory", "1GB")
    assert result.exit_code == 0, result.output
    assert "out of memory" in result.stdout
    assert "Batch 1: tokens and logits of compressed and offloaded are the same" in result.stdout


def test_a_size_that_is_none():
    result = invoke("--memory", "GB")
    assert result.exit_code == 2
    assert "'GB' is no memory size: expected one such as 24GB" in result.stderr


def test_the_script_that_plans_for_a_gpu_starts():
    # What it does needs XLA's compiler for CUDA, and is tested where there is one.
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / "compile_compare_for_gpu.py"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_more_tokens_than_the_model_was_made_for(folder, in_process):
    result = invoke(folder / "config.json", "--prompt-length", 126, "--tokens", 4)
    assert result.exit_code == 2
    assert "take 129 positions, but the model was made for 128" in result.stderr


def test_a_model_that_is_not_supported(tmp_path, in_process):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SIZES | {"model_type": "gpt2"}))
    result = invoke(path)
    assert result.exit_code == 2
    assert "config.json: the model_type 'gpt2' is not supported" in result.stderr


@pytest.mark.slow
def test_no_run_holds_the_cache_of_the_run_before():
    """Device memory would be more than planned, by a cache."""
    asked = request.Request(batch=2, prompt=8, tokens=4)
    config = models.read_config(SIZES)
    params = models.load_params(models.RandomSource(config), config, compress=False)
    programs = request.compile_request(params, config, asked)
    shape = (config.layers, asked.batch, config.kv_heads, asked.length, config.head_dim)
    caches = []

    def prefill(*inputs):
        caches.append(sum(array.shape == shape for array in jax.live_arrays()))
        return programs.prefill(*inputs)

    request.run(programs._replace(prefill=prefill), params, config, asked, repeats=2)
    assert caches == [0, 0, 0]


@pytest.mark.parametrize("most", [11, 100])
def test_longest_context_of_a_model_made_for_few_tokens(most):
    config = models.read_config(SIZES | {"max_position_embeddings": most})
    weights = placements.PlacedWeights("plain", shapes.param_shapes(config, compress=False))
    assert one_way._find_longest(weights, config, 10**9) == most


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 1000 + 8 * n,
        lambda n: 1000 + n * n,
        lambda n: 1000 + 500 * int(n**0.5),
        lambda n: 1000 if n < 4000 else 10**7,
        lambda n: 1000 + 8 * n + (5000 if n % 128 else 0) * (n > 50_000),
    ],
)
@pytest.mark.parametrize("budget", [0, 1000, 1511, 1512, 100_000, 401_000, 10**6, 10**12])
@pytest.mark.parametrize("most", [2, 63, 64, 65, 127, 128, 129, 1000, 131_072])
def test_longest_context(peak, budget, most):
    asked = []

    def asking(length):
        asked.append(length)
        return peak(length)

    longest = plan.find_longest(asking, budget, most)
    assert longest in asked or longest == 0
    assert longest == most or longest % 64 == 0
    assert not longest or peak(longest) <= budget
    too_long = min(longest + 64, most)
    assert longest == most or too_long in asked
    assert longest == most or peak(too_long) > budget
    assert max(asked) == most
    assert len(asked) <= 32


def test_longest_context_asks_little_where_memory_is_linear():
    asked = []

    def peak(length):
        asked.append(length)
        return 16_000_000_000 + 131_076 * length

    assert plan.find_longest(peak, 24_000_000_000, 131_072) == 60_992
    assert len(asked) == 4


def test_what_the_host_cannot_hold(tmp_path, in_process):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SIZES | {"hidden_size": 2**16, "num_hidden_layers": 10_000}))
    result = invoke(file, *SHORT, "--memory", "1GB")
    assert result.exit_code == 2, result.output
    assert "of the host's memory, and " in result.stderr
