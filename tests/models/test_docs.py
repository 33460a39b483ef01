import pathlib
import re

import families
import jax
import numpy as np

from df11_jax import models

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "models.md"


def test_examples(tmp_path, capsys):
    path = families.write_family(tmp_path / "qwen3", "qwen3")
    generating, saving = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names = {"path": path, "stacked": tmp_path / "stacked"}
    exec(compile(generating, str(DOCUMENT), "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 2
    loaded = names["model"]
    exec(compile(saving, str(DOCUMENT), "exec"), names)
    again = names["model"]
    assert isinstance(again, models.TextModel)
    assert (again.config, again.stop) == (loaded.config, loaded.stop)
    assert jax.tree.structure(again.params) == jax.tree.structure(loaded.params)
    for actual, want in zip(*map(jax.tree.leaves, (again.params, loaded.params)), strict=True):
        np.testing.assert_array_equal(actual, want)
