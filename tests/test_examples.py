"""The examples run, and docs/flax.md shows their code."""

import re
import runpy
import textwrap

import pytest
from compiling import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert "the same" in capsys.readouterr().out


def test_documented_code_is_in_an_example():
    sources = [path.read_text() for path in EXAMPLES]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "flax.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        for part in re.split(r"^\s*\.\.\.\n", block, flags=re.MULTILINE):
            lines = textwrap.dedent(part).strip()
            assert any(lines in textwrap.dedent(s) or _indented(lines, s) for s in sources), lines


def _indented(lines, source):
    return any(textwrap.indent(lines, " " * n) in source for n in (4, 8, 12))
