import runpy

import pytest
from compiling import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert "the same" in capsys.readouterr().out
