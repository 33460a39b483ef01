"""`df11-jax generate` as several processes."""

import families
import pytest
from click.testing import CliRunner
from processes import find_port, start_python

from df11_jax.cli import _commands, _processes


def invoke(*arguments):
    return CliRunner().invoke(_commands.commands, ["generate", *map(str, arguments)])


@pytest.mark.slow
def test_two_processes_print_what_one_does(tmp_path):
    path = families.write_family(tmp_path / "m", "llama-biases")
    arguments = [path, "--prompt", "It is", "--tokens", 8]
    text = invoke(*arguments, "--devices", 4).stdout
    together = ["--coordinator", f"localhost:{find_port()}", "--num-processes", 2, "--process-id"]
    program = "from df11_jax.cli import main\nmain()"
    processes = [
        start_python(program, "generate", *arguments, *together, i, devices=2) for i in range(2)
    ]
    results = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    (output, said), (silent, nothing) = results
    # Gloo says on the standard output that it is connected.
    assert "It is" in output and output.endswith(text.removeprefix("It is"))
    assert "on each of 4 devices" in said
    assert not nothing and all(line.startswith("[Gloo]") for line in silent.splitlines())


def test_options_that_are_missing(tmp_path):
    output = invoke(tmp_path, "--prompt", "x", "--process-id", 1).output
    assert "--coordinator, --process-id and --num-processes belong together" in output


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", "localhost:99999", "localhost:-1"]
)
def test_an_address_without_a_port(tmp_path, address):
    others = ["--process-id", 0, "--num-processes", 2]
    output = invoke(tmp_path, "--prompt", "x", "--coordinator", address, *others).output
    assert f"--coordinator {address}: expected HOST:PORT" in output


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_launchers(monkeypatch, environment, expected):
    for name in (*_processes.COUNTS, _processes.POD):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _processes.is_launched() is expected
