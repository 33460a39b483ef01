"""What the examples of README.md and docs/ find when they run, and what has to come of them."""

import contextlib
import runpy
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
from compiling import ROOT
from flax import nnx
from model_files import tensors
from orbax_helpers import assert_same_tree, assert_same_weights, compressed_params
from payloads import random_weights

import df11_jax
import df11_jax.nnx
from df11_jax import checkpoints, models

Names = dict[str, Any]

_TINY_LLAMA = ROOT / "tests" / "published" / "fixtures" / "tiny_llama"


@contextlib.contextmanager
def _readme(folder: Path) -> Iterator[Names]:
    params = {name: jnp.asarray(array) for name, array in tensors().items()}
    checkpoints.save(df11_jax.compress_params(params), folder / "Qwen3-8B-df11")
    shutil.copytree(_TINY_LLAMA / "sharded", folder / "Qwen3-8B-DF11")
    yield {"folder": folder / "orbax", "step": 3}


@contextlib.contextmanager
def _guide(folder: Path) -> Iterator[Names]:
    shutil.copytree(_TINY_LLAMA / "original", folder / "my-model")
    yield {}


@contextlib.contextmanager
def _models(folder: Path) -> Iterator[Names]:
    path = families.write_family(folder / "qwen3", "qwen3")
    names = {"path": path, "stacked": folder / "stacked"}
    yield names
    assert_same_tree(names["model"].params, models.load(path).params)


@contextlib.contextmanager
def _orbax(folder: Path) -> Iterator[Names]:
    params = compressed_params()
    names = {
        "folder": folder / "folder",
        "path": folder / "path",
        "v1_path": folder / "v1",
        "step": 3,
        "params": params,
        "opt_state": {"mu": jnp.ones(3)},
    }
    yield names
    assert_same_tree(names["restored"].params, params)
    assert_same_tree(names["params"], params)
    assert_same_weights(names["weights"], params)


@contextlib.contextmanager
def _linen(folder: Path) -> Iterator[Names]:
    names = _example("linen_model.py")
    tokens = jnp.zeros((2, names["LENGTH"]), jnp.int32)
    params = jax.jit(names["model"].init)(jax.random.key(0), tokens)["params"]
    names |= {"params": params, "float32_model": folder / "plain"}
    names |= {"compressed_model": folder / "compressed"}
    checkpoints.save(jax.tree.map(lambda a: a.astype(jnp.float32), params), names["float32_model"])
    yield names
    small = names["small"]
    assert df11_jax.size_report(small).nbytes < df11_jax.size_report(params).nbytes
    jax.tree.map(np.testing.assert_array_equal, df11_jax.decompress_params(small), params)


@contextlib.contextmanager
def _nnx(folder: Path) -> Iterator[Names]:
    names = _example("nnx_model.py")
    model, token = names["Model"](nnx.Rngs(0)), jnp.array([[1], [2]])
    expected = names["generate"](model, token)
    for layer in model.layers:  # again empty
        layer.attention.init_cache((2, names["LENGTH"], names["WIDTH"]), dtype=jnp.bfloat16)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make_layers(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(128, 128, rngs=rngs, param_dtype=jnp.bfloat16)

    layers = make_layers(nnx.Rngs(0).split(3))
    df11_jax.nnx.compress(layers, stacked=".")
    names |= {"model": model, "token": token, "layers": layers, "x": random_weights((1, 128), 1)}
    yield names
    np.testing.assert_array_equal(names["tokens"], expected)


@contextlib.contextmanager
def _lora(folder: Path) -> Iterator[Names]:
    names = _example("lora.py")
    _, params, lora = names["initialise"]()
    yield names | {
        "model": names["COMPRESSED"],
        "params": params,
        "lora": lora,
        "state": names["OPTIMIZER"].init(lora),
        "tokens": jnp.arange(16, dtype=jnp.int32).reshape(2, 8),
    }


def _example(name: str) -> Names:
    return runpy.run_path(str(ROOT / "examples" / name))


# By page, or by page and section, which then has names of its own. The examples run in the folder.
PREPARE: dict[str, Callable[[Path], AbstractContextManager[Names]]] = {
    "README.md": _readme,
    "guide.md": _guide,
    "models.md": _models,
    "orbax.md": _orbax,
    "flax.md#linen": _linen,
    "flax.md#nnx": _nnx,
    "flax.md#lora": _lora,
}
