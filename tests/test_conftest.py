import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import df11_jax


@pytest.mark.slow
def test_a_source_tree_that_is_not_compiled(tmp_path):
    # As after `pip install .`, when it is the tree that Python imports.
    package = pathlib.Path(df11_jax.__file__).parent
    libraries = list(package.glob("_cpu_library.*.so"))
    if not libraries:
        pytest.skip("df11_jax is installed to be edited, and is then imported everywhere")
    uncompiled = shutil.ignore_patterns("_cpu_library.*.so")
    shutil.copytree(package, tmp_path / "df11_jax", ignore=uncompiled)
    (tmp_path / "tests").mkdir()
    shutil.copy(pathlib.Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_it.py").write_text("def test_it(): pass")

    def run(*command):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [sys.executable, *command, "tests"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    result = run("-m", "pytest")
    assert result.returncode == 4, result.stdout
    (message,) = result.stderr.strip().splitlines()
    assert message.startswith(f"ERROR: {tmp_path / 'df11_jax'} has no compiled library")
    assert "run `pytest`" in message and "pip install -e ." in message

    for library in libraries:
        shutil.copy(library, tmp_path / "df11_jax")
    assert run("-m", "pytest").returncode == 0
