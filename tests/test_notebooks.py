"""The notebooks run from top to bottom, check what they show, and are saved with their outputs."""

import base64
import re
import runpy
import tomllib

import pytest
from compiling import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install '.[test]'")
pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNNER = ROOT / "tools" / "run_notebooks.py"

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell puts out: text or plots. Not the numbers, which differ between versions."""
    return [
        (output.output_type, *sorted(output.get("data", {})))
        for output in cell.outputs
        if output.get("name") != "stderr"  # of the kernel's process: XLA's log, too
    ]


def text_of(output):
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["attached_gpu", "quickstart", "your_own_model"]


@each
def test_runs(path, tmp_path, monkeypatch):
    # As users have it: JAX's own number of CPU devices, and XLA's own scheduler.
    monkeypatch.delenv("XLA_FLAGS")
    # This process may hold a GPU's memory already.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    saved = code_cells(nbformat.read(path, as_version=4))
    ran = code_cells(runpy.run_path(str(RUNNER))["run"](path, tmp_path))
    assert [cell.execution_count for cell in saved] == [cell.execution_count for cell in ran]
    for before, now in zip(saved, ran, strict=True):
        assert kinds(before) == kinds(now), f"run {RUNNER.name}; the outputs are of other\n{now}"


@each
def test_is_saved_as_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == runpy.run_path(str(RUNNER))["METADATA"]
    assert path.stat().st_size < 200_000
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        i + 1 for i in range(len(code_cells(notebook)))
    ]
    for cell in notebook.cells:
        assert not cell.metadata
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output
            assert not re.search(r"/(home|root|tmp|usr|Users)/", text_of(output)), output
            image = output.get("data", {}).get("image/png")
            assert image is None or base64.b64decode(image).startswith(b"\x89PNG")


@each
def test_checks_bits(path):
    sources = [cell.source for cell in code_cells(nbformat.read(path, as_version=4))]
    assert sum("assert_same_bits(" in source or "array_equal(bits(" in source for source in sources)
    plots = sum("plt.show()" in source for source in sources)
    assert plots or path.stem == "attached_gpu"


@each
def test_opens_in_colab(path):
    head, install, *_ = nbformat.read(path, as_version=4).cells
    page = f"github/df11-jax/df11_jax/blob/main/notebooks/{path.name}"
    assert f"https://colab.research.google.com/{page}" in head.source
    first, *_ = (nbformat.read(other, as_version=4).cells[1] for other in NOTEBOOKS)
    assert install.source == first.source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"/releases/expanded_assets/v{project['version']}" in install.source
    # The index is not asked for df11_jax, whose name is not the project's yet.
    assert "--no-index" in install.source and '"df11_jax[notebooks] @ {place}"' in install.source
