import jax.numpy as jnp
import numpy as np
import pytest
from payloads import random_weights
from safetensors.flax import save_file as save_safetensors

import df11_jax
from df11_jax import _file


def params():
    return df11_jax.compress_params(
        {
            "layers": {"kernel": random_weights((2, 256, 64))},
            "bias": jnp.arange(10, dtype=jnp.bfloat16),
        },
        stacked="^layers",
    )


def test_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    tree = params()
    _file.save_file(tree, path)
    loaded = _file.load_file(path)
    assert repr(loaded["layers"]["kernel"]) == repr(tree["layers"]["kernel"])
    for a, b in zip(
        loaded["layers"]["kernel"].payload, tree["layers"]["kernel"].payload, strict=True
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        np.asarray(loaded["bias"]).view(np.uint16), np.asarray(tree["bias"]).view(np.uint16)
    )
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    _file.save_file(params(), path)
    before = path.read_bytes()
    for bad in ({"a/b": jnp.zeros(1)}, {"a": [jnp.zeros(1)]}):
        with pytest.raises(ValueError, match="only nested dicts"):
            _file.save_file(bad, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_files(tmp_path):
    path = tmp_path / "bad.safetensors"
    save_safetensors({"a": jnp.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"bad\.safetensors: expected a file with the metadata"):
        _file.load_file(path)

    metadata = _file._METADATA
    parts = dict(
        zip(
            ("header", "codebook", "chunk_offsets", "exponents", "sign_mantissa"),
            params()["layers"]["kernel"].payload,
            strict=True,
        )
    )

    def check(changes, message):
        kept = {k: v for k, v in (parts | changes).items() if v is not None}
        save_safetensors({f"w:{k}": v for k, v in kept.items()}, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            _file.load_file(path)

    check({"codebook": None}, "w: expected the parts")
    check({"header": parts["header"].at[0, 0].set(9)}, "w: format version 9 is unknown")
    check({"sign_mantissa": parts["sign_mantissa"][:, :-4]}, "w: sign_mantissa is uint32")
    check({"header": parts["header"][:0]}, "w: ")
