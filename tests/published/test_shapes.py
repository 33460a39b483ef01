import json

import numpy as np
import pytest
from tiny_llama import ORIGINAL, original, save

from df11_jax.published._shapes import read_shapes


def test_shapes_from_files(tmp_path):
    expected = {name: array.shape for name, array in original().items()}
    assert read_shapes(ORIGINAL) == expected
    assert read_shapes(str(ORIGINAL / "model.safetensors")) == expected
    names = list(expected)
    files = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, members in files.items():
        save(tmp_path / file, {name: original()[name] for name in members})
    assert read_shapes(tmp_path) == expected
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, members in files.items() for name in members}
    index.write_text(json.dumps({"weight_map": weight_map}))
    save(tmp_path / "other.safetensors", {"x": np.zeros(3)})
    assert read_shapes(index) == expected
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        read_shapes(index)


def test_shapes_from_a_mapping():
    assert read_shapes(None) == {}
    assert read_shapes({"a": [np.int64(2), 3], "b": ()}) == {"a": (2, 3), "b": ()}


@pytest.mark.parametrize("shape", [(2, -3), (2.0, 3), "ab"])
def test_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"shapes: a: .* is not a shape"):
        read_shapes({"a": shape})


def test_no_shapes_there(tmp_path):
    with pytest.raises(ValueError, match=r"there are no \*\.safetensors files"):
        read_shapes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_shapes(tmp_path / "x.safetensors")
