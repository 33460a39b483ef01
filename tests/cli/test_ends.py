"""How commands end that cannot do what they should, whatever the files and the names in them."""

import json
import math
import os
import subprocess
import sys
import unicodedata

import families
import jax
import model_files
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from df11_jax._progress import ProgressBar, say
from df11_jax.cli import _commands, info

SPOOF = "a\nError: spoof"
# Names and strings of files that nobody can trust.
HOSTILE = (
    "[/x]",
    "[bold]x",
    "\x1b[31mred\x07",
    SPOOF,
    "over\r",
    "\u202eabc",
    "\x00",
    "",
    "x" * 3000,
    "é" * 300,
    "../..",
    "/etc/passwd",
    "a/b",
    ":header",
    "w:sign_mantissa",
    "model.layers.0.encoded_exponent",
    "{}",
    "%s",
)
HUGE = 10**399


def run(*args):
    """The status and what a command prints, all of which is checked to be clean."""
    result = CliRunner().invoke(_commands.commands, [str(arg) for arg in args])
    assert isinstance(result.exception, SystemExit | None), result.exception
    for text in (result.stdout, result.stderr):
        assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in text if c != "\n"), text
        assert "\nError: spoof" not in text
    assert "is a bug" not in result.stderr, result.stderr
    if result.exit_code == 2 and not result.stderr.startswith("Usage: "):
        assert not result.stdout
        assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("Error: ")
    return result.exit_code, result.output


def process(*args, before="", **options):
    """A real `df11-jax`, after the given statements."""
    program = f"import resource\nfrom df11_jax.cli import main, _commands\n{before}\nmain()"
    command = [sys.executable, "-P", "-c", program, *map(str, args)]
    return subprocess.run(command, timeout=600, stderr=subprocess.PIPE, text=True, **options)


def write_tensors(path, entries, metadata=None, data=b""):
    header = {**({} if metadata is None else {"__metadata__": metadata}), **entries}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


_TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=8)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | _TEXTS
    | st.sampled_from([HUGE, -HUGE, 0, -1, 1, 2**24, 2**31, 2**63])
    | st.sampled_from(["llama", "gemma3", "qwen3", "linear", "llama3", "fp8", "full_attention"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=5,
)
_FIELDS = (
    *families.CONFIGS["gemma3_text"],
    "architectures",
    "dfloat11_config",
    "layer_types",
    "quantization_config",
    "rope_parameters",
    "text_config",
)
_ENTRIES = st.dictionaries(
    _TEXTS | st.sampled_from(["w:header", "model.embed_tokens.weight"]),
    st.tuples(
        st.sampled_from(["BF16", "F32", "U8", "F4"]) | _TEXTS,
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=4,
)
_METADATA = st.none() | st.dictionaries(
    st.sampled_from(["format", "version", "structure", "crc32:w", "source:x"]) | _TEXTS,
    st.sampled_from(["df11_jax", "2", "3", "{}", "pt"]) | _TEXTS,
    max_size=3,
)
_SIZES = {"BF16": 2, "F32": 4}


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(sorted(families.CONFIGS)),
    changes=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=3),
    tensors=_ENTRIES,
    metadata=_METADATA,
    index=st.none() | _VALUES | st.fixed_dictionaries({"weight_map": _VALUES}),
    name=st.sampled_from(["m", "[x]", "\x1b[31m", SPOOF]),
)
def test_hostile_directories(tmp_path_factory, family, changes, tensors, metadata, index, name):
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / name
    path.mkdir()
    entries, end = {}, 0
    for tensor, (dtype, shape) in tensors.items():
        begin, end = end, end + _SIZES.get(dtype, 1) * math.prod(shape)
        entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    write_tensors(path / "model.safetensors", entries, metadata, bytes(end))
    (path / "config.json").write_text(json.dumps(families.CONFIGS[family] | changes))
    families.make_tokenizer().save(str(path / "tokenizer.json"))
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for status, args in (
        ({0, 2}, ("info", path)),
        ({0, 2}, ("info", path, "--json")),
        ({0, 1, 2}, ("verify", path, path / "model.safetensors")),
        ({0, 2}, ("compress", path, folder / "native")),
        ({0, 2}, ("compress", path / "model.safetensors", folder / "out.safetensors")),
        ({0, 2}, ("compress", path, folder / "published", "--format", "published")),
        ({0, 2}, ("decompress", path, folder / "plain")),
        ({0, 2, 3}, ("fit", path, "--memory", "1GiB")),
        ({0, 2, 3}, ("fit", path / "config.json", "--memory", "1GiB")),
        ({2}, ("generate", path, "--prompt", "x")),
    ):
        assert run(*args)[0] in status


def test_progress_of_hostile_names(capsys, monkeypatch):
    monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
    with ProgressBar("compress", 3, show=True) as bar:
        bar.update("\x1b[31mred\x07", 3)
    say("a\x1b[31m\nb")
    shown = capsys.readouterr().err
    assert r"\x1b[31mred\x07" in shown and r"a\x1b[31m" in shown
    assert "\x1b[31m" not in shown and "\x07" not in shown


@pytest.mark.parametrize("field", [*_FIELDS, "rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_numbers_of_400_digits(tmp_path, family, field):
    fields = families.CONFIGS[family] | {field: HUGE}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    status, output = run("fit", tmp_path, "--memory", "1GiB")
    assert status in (0, 3) or field in output


@pytest.mark.parametrize("size", ["--context", "--batch", "--devices"])
def test_options_of_400_digits(tmp_path, size):
    (tmp_path / "config.json").write_text(json.dumps(families.CONFIGS["llama"]))
    status, _ = run("fit", tmp_path, "--memory", "1GiB", size, HUGE)
    assert status in (2, 3)


COMMANDS = {
    "info": (),
    "verify": (".",),
    "compress": ("out",),
    "decompress": ("out",),
    "fit": ("--memory", "1GiB"),
    "generate": ("--prompt", "x"),
}


@pytest.mark.parametrize("path", ["x" * 300, "loop", "file/x", "nothing \x1b[31m", SPOOF])
@pytest.mark.parametrize("command", COMMANDS)
def test_paths_at_which_nothing_can_be(tmp_path, monkeypatch, command, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert run(command, path, *COMMANDS[command])[0] == 2
    if command == "compress" and path in ("x" * 300, "loop", "file/x"):
        plain = model_files.write_model(tmp_path / "plain", {"w": np.zeros(3, np.float32)})
        assert run(command, plain, path)[0] == 2


@pytest.mark.parametrize(
    "args",
    [
        *((command, "", *args) for command, args in COMMANDS.items()),
        ("verify", ".", ""),
        ("compress", "plain", ""),
        ("decompress", "plain", ""),
        ("bench", "--plot", ""),
        ("compare", "--plot", ""),
    ],
)
def test_an_empty_path_is_not_the_current_directory(tmp_path, monkeypatch, args):
    here = model_files.write_model(tmp_path / "here", {"w": np.zeros(3, np.float32)})
    monkeypatch.chdir(here)
    status, output = run(*args)
    assert status == 2 and "must not be empty" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_current_directory_that_was_removed(tmp_path, plain, monkeypatch, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    status, output = run(command, "../plain", *COMMANDS[command])
    assert status == 2 and "the current directory is not there any more" in output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", COMMANDS)
def test_directories_that_cannot_be_read(tmp_path, command):
    path = model_files.write_model(tmp_path / "plain", {"w": np.zeros(3, np.float32)})
    path.chmod(0)
    try:
        status, output = run(command, path, *COMMANDS[command])
    finally:
        path.chmod(0o700)
    assert status == 2 and ("Permission denied" in output or "is not readable" in output)


def test_too_many_open_files(tmp_path):
    weights = {f"w{i}": np.zeros(3, np.float32) for i in range(64)}
    path = model_files.write_model(tmp_path / "plain", weights, shards=64)
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    ended = process("info", path, before=limit)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"Error: {path}/model-000")
    assert ended.stderr.endswith(": Too many open files\n")


def test_too_little_memory_to_map_a_file(tmp_path):
    nbytes = 1 << 40
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}})
    try:
        os.truncate(path, path.stat().st_size + nbytes)
    except OSError:
        pytest.skip("the file system has no files of that size")
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({nbytes}, {nbytes}))"
    ended = process("verify", path, path, before=limit)
    assert ended.returncode == 2
    assert ended.stderr == f"Error: {path}: Cannot allocate memory\n"


@pytest.fixture
def plain(tmp_path):
    return model_files.write_model(tmp_path / "plain", {"é": np.zeros(3, np.float32)})


def test_a_closed_output(plain):
    ended = process("info", plain, before="import os, sys; os.close(1); sys.stdout = None")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("args", [("info", "."), ("info", "--help"), ("--help",), ("--version",)])
def test_a_full_disk_behind_the_output(plain, args):
    with open("/dev/full", "w") as full:
        ended = process(*args, stdout=full, cwd=plain)
    assert ended.returncode == 2
    assert ended.stderr == "Error: No space left on device\n"


@pytest.mark.parametrize("args", [("info", "."), ("--help",)])
def test_nobody_reads_the_output(plain, args):
    read, write = os.pipe()
    os.close(read)
    ended = process(*args, stdout=write, cwd=plain)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize(
    ("args", "status"),
    [(("verify", ".", "other"), 1), (("verify", ".", "nothing"), 2), (("nothing",), 2)],
)
def test_the_status_does_not_depend_on_the_standard_error(plain, args, status):
    model_files.write_model(plain / "other", {"w": np.zeros(3, np.float32)})
    # Nobody is told what differs, or what is missing; status 1 must mean the first alone.
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-c", "from df11_jax.cli import main; main()", *args]
        assert subprocess.run(command, stderr=full, cwd=plain, timeout=600).returncode == status


def test_no_standard_error(plain):
    (plain / "folder").mkdir()  # of which compress says that it is not copied
    closed = "import os, sys; os.close(2); sys.stderr = None"
    ended = process("compress", plain, "out", before=closed, stdout=subprocess.PIPE, cwd=plain)
    assert ended.returncode == 0
    (line,) = ended.stdout.splitlines()  # what others read, without what is said beside it
    assert line.startswith("out: native, ")


def test_names_that_the_output_cannot_show(plain):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = process("info", plain, stdout=subprocess.PIPE, env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert r"\xe9" in ended.stdout


def test_an_interrupt_during_the_collection_of_garbage(plain):
    before = """
import gc, os, signal, time
from df11_jax.cli import info
def summarize(source):
    gc.callbacks.append(lambda *_: gc.callbacks.pop() and os.kill(os.getpid(), signal.SIGINT))
    gc.collect()
    time.sleep(60)
info.summarize = summarize
"""
    ended = process("info", plain, before=before)
    assert (ended.returncode, ended.stderr) == (130, "Error: interrupted\n")


def test_an_interrupt_while_a_module_is_imported(plain, monkeypatch):
    def fail(*args):
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr(info, "summarize", fail)
    assert run("info", plain) == (130, "Error: interrupted\n")


def test_an_interrupt_to_which_jax_gives_a_cause(plain, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    # As it does while it lowers programs.
    function = jax.custom_vjp(lambda x: x)
    function.defvjp(lambda x: (x, None), interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        jax.grad(function)(1.0)
    assert error.value.__cause__ is not None
    monkeypatch.setattr(info, "summarize", lambda source: jax.grad(function)(1.0))
    assert run("info", plain) == (130, "Error: interrupted\n")


@pytest.mark.parametrize(
    "error", [KeyError("\x1b[31mkey"), RecursionError("deep"), AssertionError()]
)
def test_bugs_say_that_they_are(plain, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(info, "summarize", fail)
    for traceback in (False, True):
        monkeypatch.setenv("DF11_JAX_TRACEBACK", "1" if traceback else "")
        result = CliRunner().invoke(_commands.commands, ["info", str(plain)])
        assert result.exit_code == 2
        *before, line = result.stderr.splitlines()
        assert line.startswith(f"Error: {type(error).__name__}: ") and "is a bug" in line
        assert "\x1b" not in result.stderr
        assert any("in fail" in line for line in before) == traceback == bool(before)


def test_too_little_memory_is_no_bug(plain, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(info, "summarize", fail)
    assert run("info", plain) == (2, "Error: not enough memory\n")
