import pathlib
import re

import families

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "models.md"


def test_example(tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    path = families.write_family(tmp_path / "qwen3", "qwen3")
    exec(compile(example, str(DOCUMENT), "exec"), {"path": path})
    assert capsys.readouterr().out.count("\n") >= 2
