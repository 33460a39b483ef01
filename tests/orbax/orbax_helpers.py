"""Parameters to save, and comparisons."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from payloads import assert_same_bits, random_weights
from processes import finish as finish
from processes import run_python as run_python
from processes import start_python as start_python

import df11_jax
from df11_jax._array import DF11Array, is_df11
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, DF11Save


def plain_params() -> dict[str, Any]:
    """A stack, single tensors, and what compression leaves alone."""
    return {
        "layers": {
            "up": random_weights((3, 128, 192), seed=1),
            "norm": jnp.ones((3, 128), jnp.bfloat16),
        },
        "embedding": random_weights((200, 128), seed=2),
        "head": {"kernel": random_weights((128, 131), seed=3), "bias": jnp.arange(5.0)},
    }


def compressed_params() -> dict[str, Any]:
    return df11_jax.compress_params(plain_params(), stacked="^layers/")


def assert_same_tree(actual: Any, expected: Any) -> None:
    """The same containers, forms of leaves, types, shapes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.shape(a) == np.shape(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_weights(actual: Any, expected: Any) -> None:
    """The same weights, in whatever form."""
    actual, expected = map(df11_jax.decompress_params, (actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if np.asarray(a).dtype == jnp.bfloat16:
            assert_same_bits(a, b)
        else:
            np.testing.assert_array_equal(a, b)


def abstract(tree: Any) -> Any:
    """The same with shapes, and shardings, in the places of the arrays."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
        tree,
    )


def save(path: pathlib.Path, item: Any, **options: Any) -> None:
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=DF11Save(item, **options))


def restore(path: pathlib.Path, item: Any = None, **options: Any) -> Any:
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=DF11Restore(item, **options))


def save_plain(path: pathlib.Path, item: Any, **options: Any) -> None:
    """As Orbax alone does it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(item, **options))


def edit_metadata(path: pathlib.Path, change: Callable[[Any], None]) -> None:
    """Changes the manifest of a checkpoint."""
    file = path / "_METADATA"
    data = json.loads(file.read_text())
    change(data["custom_metadata"]["df11_jax"])
    file.write_text(json.dumps(data))


def compressed_leaves(tree: Any) -> list[DF11Array]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_df11) if is_df11(leaf)]
