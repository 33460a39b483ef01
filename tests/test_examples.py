import subprocess
import sys

import pytest
from compiling import ROOT
from programs import read_metadata

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = sorted((ROOT / "examples" / "programs").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_runs(path, monkeypatch):
    # As users have it; the one that trains would take twice as long with what conftest.py sets.
    monkeypatch.delenv("XLA_FLAGS")
    ended = subprocess.run([sys.executable, "-P", path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "the same" in ended.stdout


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_say_what_they_need(path):
    # `tools/programs.py` runs them, each in an environment of its own.
    requirements = read_metadata(path)["dependencies"]
    assert requirements[0].partition("[")[0] == "df11_jax"
    assert any("==" in requirement for requirement in requirements)
    assert f"examples/programs/{path.name}" in (ROOT / "docs" / "programs.md").read_text()


def test_a_program_that_is_not_there():
    command = [sys.executable, "-P", ROOT / "tools" / "programs.py", "with_qwix.py"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "no such example: with_qwix.py; there are with_bonsai, " in ended.stderr
