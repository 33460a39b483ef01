import numpy as np
import pytest
import safetensors.numpy

from df11_jax._files.canonical_safetensors import write_file
from df11_jax._files.safetensors import DTYPES
from df11_jax._files.source import TensorInfo


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_same_bytes_as_the_safetensors_library(tmp_path, metadata):
    random = np.random.default_rng(0)
    tensors = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        for letter, shape in (("z", (i % 3, 5)), ("a", (3,)), ("ü.é", ())):
            data = random.integers(0, 2, (*shape, dtype.itemsize), np.uint8)
            tensors[f"{letter}.{name}"] = data.view(dtype)[..., 0]
    save_as(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(tensors, metadata)


def save_as(path, tensors, metadata):
    names = {dtype: name for name, dtype in DTYPES.items()}
    infos = {
        name: TensorInfo(array.shape, names[array.dtype], array.nbytes, array.nbytes)
        for name, array in tensors.items()
    }
    write_file(path, infos, tensors.__getitem__, metadata)


def test_a_source_that_changes(tmp_path):
    with pytest.raises(ValueError, match=r"a: was announced as BF16\[2\], but is float32\[2\]"):
        write_file(
            tmp_path / "x",
            {"a": TensorInfo((2,), "BF16", 4, 4)},
            lambda name: np.zeros(2, np.float32),
        )
    assert not list(tmp_path.iterdir())
