"""What the examples of README.md and docs/ find as files, and what has to come of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
from compiling import ROOT
from flax import nnx
from model_files import tensors
from orbax_helpers import assert_same_tree, assert_same_weights

import df11_jax
import df11_jax.nnx
from df11_jax import checkpoints, models

Names = dict[str, Any]

_TINY_LLAMA = ROOT / "tests" / "published" / "fixtures" / "tiny_llama"


def _make_readme() -> None:
    params = {name: jnp.asarray(array) for name, array in tensors().items()}
    checkpoints.save(df11_jax.compress_params(params), "Qwen3-0.6B-small")
    shutil.copytree(_TINY_LLAMA / "sharded", "Qwen3-8B-DF11")


def _make_guide() -> None:
    shutil.copytree(_TINY_LLAMA / "original", "my-model")


def _make_models() -> None:
    families.write_family(Path("Llama-3.2-1B"), "llama", shards=2)


def _check_models(names: Names) -> None:
    assert_same_tree(names["model"].params, models.load("Llama-3.2-1B").params)


def _check_orbax(names: Names) -> None:
    assert_same_tree(names["restored"].params, names["params"])
    assert_same_weights(names["plain"], names["params"])
    np.testing.assert_array_equal(names["plain"]["layers"]["up"], names["weights"])


def _check_flax(names: Names) -> None:
    small, params = names["small"], names["params"]
    assert df11_jax.size_report(small).nbytes < df11_jax.size_report(params).nbytes
    # As the model was before it was compressed.
    network = names["Network"](nnx.Rngs(0))
    expected = names["generate"](network, jnp.array([[1], [2]]))
    np.testing.assert_array_equal(names["generated"], expected)
    assert df11_jax.size_report(nnx.state(names["layers"])).leaves[-1].compressed
    assert jax.tree.map(jnp.shape, names["gradients"]) == jax.tree.map(jnp.shape, names["lora"])


# By page. The files are made in the folder in which the examples run.
FILES: dict[str, Callable[[], object]] = {
    "README.md": _make_readme,
    "guide.md": _make_guide,
    "models.md": _make_models,
}
CHECK: dict[str, Callable[[Names], None]] = {
    "flax.md": _check_flax,
    "models.md": _check_models,
    "orbax.md": _check_orbax,
}
