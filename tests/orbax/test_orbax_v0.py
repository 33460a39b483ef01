import dataclasses

"""The handler for Orbax's first API, and plain Orbax with compressed parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax_helpers import (
    abstract,
    assert_same_tree,
    assert_same_weights,
    compressed_params,
    plain_params,
    restore,
    run_python,
    save,
)

import df11_jax
from df11_jax._layout import make_layout
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, DF11Save


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_round_trip(tmp_path):
    small = compressed_params()
    save(tmp_path / "x", small)
    back = restore(tmp_path / "x")
    assert_same_tree(back, small)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(back))
    assert_same_tree(restore(tmp_path / "x", small), small)
    assert_same_tree(restore(tmp_path / "x", abstract(small)), small)


def test_async(tmp_path):
    """What is saved is what was there when the call returned."""
    small = compressed_params()
    expected = jax.tree.map(lambda a: np.array(a), small)
    with ocp.AsyncCheckpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "x", args=DF11Save(small))
        for array in jax.tree.leaves(small):
            array.delete()
        checkpointer.wait_until_finished()
        assert_same_tree(checkpointer.restore(tmp_path / "x", args=DF11Restore()), expected)


def test_async_with_donated_parameters(tmp_path):
    """A training step that overwrites its parameters may follow at once."""
    params = {
        "w": jnp.ones((512, 512)),
        "small": df11_jax.compress(jnp.ones((128, 130), jnp.bfloat16)),
    }
    expected = jax.tree.map(lambda a: np.array(a), params)
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    with ocp.AsyncCheckpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "x", args=DF11Save(params))
        for _ in range(3):
            params = step(params)
        jax.block_until_ready(params)
        checkpointer.wait_until_finished()
        assert_same_tree(checkpointer.restore(tmp_path / "x", args=DF11Restore()), expected)


def test_manager_with_optimizer_state(tmp_path):
    """Several steps of several items, saved asynchronously; only the last ones are kept."""
    steps = {}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(4):
            plain = jax.tree.map(lambda a, step=step: a + step, plain_params())
            moments = jax.tree.map(lambda a: a.astype(jnp.float32), plain)
            state = {"mu": moments, "nu": moments, "count": jnp.asarray(step)}
            small = df11_jax.compress_params(plain, stacked="^layers/")
            steps[step] = small, state
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=DF11Save(small),
                    opt_state=ocp.args.StandardSave(state),
                    extra=ocp.args.JsonSave({"step": step}),
                ),
            )
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (2, 3):
            small, state = steps[step]
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    params=DF11Restore(),
                    opt_state=ocp.args.StandardRestore(abstract(state)),
                    extra=ocp.args.JsonRestore(),
                ),
            )
            assert_same_tree(restored.params, small)
            assert_same_tree(restored.opt_state, state)
            assert restored.extra == {"step": step}


def test_manager_finds_the_handler_by_itself(tmp_path):
    small = compressed_params()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(params=DF11Save(small)))
    program = """
import sys, orbax.checkpoint as ocp, df11_jax.orbax
with ocp.CheckpointManager(sys.argv[1]) as manager:
    print(manager.restore(0).params)
"""
    assert "DF11Array(bfloat16[3,128,192]" in run_python(program, tmp_path)


def test_orbax_is_imported_when_asked_for():
    program = "import sys, df11_jax; print([name for name in sys.modules if 'orbax' in name])"
    assert run_python(program).strip() == "[]"


def test_single_item_manager(tmp_path):
    small = compressed_params()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=DF11Save(small))
        manager.wait_until_finished()
        assert_same_tree(manager.restore(0, args=DF11Restore()), small)


def test_metadata(tmp_path):
    """Says what there is without reading it, and is a target."""
    small = compressed_params()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(params=DF11Save(small, custom_metadata={"a": 1})))
    handlers = {"params": DF11CheckpointHandler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        metadata = manager.item_metadata(0)["params"]
        assert jax.tree.structure(metadata) == jax.tree.structure(small)
        assert str(df11_jax.size_report(metadata)) == str(df11_jax.size_report(small))
        part = {"head": metadata["head"]}
        restored = manager.restore(
            0, args=ocp.args.Composite(params=DF11Restore(part, partial_restore=True))
        )
        assert_same_tree(restored.params, {"head": small["head"]})
    alone = DF11CheckpointHandler().metadata(str(tmp_path / "0" / "params"))
    assert jax.tree.structure(alone) == jax.tree.structure(small)
    with ocp.PyTreeCheckpointer() as plain:
        custom = plain.metadata(tmp_path / "0" / "params").item_metadata.custom_metadata
    assert custom["a"] == 1
    assert custom["df11_jax"]["format"] == "df11_jax.orbax"
    paths = [leaf["path"] for leaf in custom["df11_jax"]["leaves"]]
    assert paths == ["embedding", "head/bias", "head/kernel", "layers/norm", "layers/up"]


def test_custom_metadata_of_the_same_name(tmp_path):
    with pytest.raises(ValueError, match="custom_metadata has the key 'df11_jax'"):
        save(tmp_path / "x", compressed_params(), custom_metadata={"df11_jax": {}})


def test_orbax_alone_reads_the_arrays(tmp_path):
    """Without df11_jax, a compressed leaf is a dict of arrays."""
    small = compressed_params()
    save(tmp_path / "x", small)
    program = """
import sys, orbax.checkpoint as ocp
with ocp.PyTreeCheckpointer() as checkpointer:
    up = checkpointer.restore(sys.argv[1])["layers"]["up"]
assert not any(name.startswith("df11_jax") for name in sys.modules)
print({name: array.shape for name, array in sorted(up.items())})
"""
    header, codebook, chunk_offsets, exponents, sign_mantissa = small["layers"]["up"].payload
    tables = np.concatenate([header, codebook, chunk_offsets], axis=-1)
    arrays = {"exponents": exponents, "sign_mantissa": sign_mantissa, "tables": tables}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    assert run_python(program, tmp_path / "x").strip() == str(shapes)


def test_standard_checkpointer_alone(tmp_path):
    """Compressed parameters are a pytree: with a target, plain Orbax does."""
    small = compressed_params()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", small)
        checkpointer.wait_until_finished()
        assert_same_tree(checkpointer.restore(tmp_path / "x", abstract(small)), small)
        assert_same_tree(checkpointer.restore(tmp_path / "x", zeros_like(small)), small)


def test_what_the_standard_checkpointer_does_not_do(tmp_path):
    """Without a target dicts come back, and a wrong static shape is not noticed."""
    small = compressed_params()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", small)
        checkpointer.wait_until_finished()
        with pytest.warns(UserWarning, match="Sharding info not provided"):
            back = ocp.PyTreeCheckpointer().restore(tmp_path / "x")
        assert type(back["embedding"]) is dict
        wrong = abstract(small)
        wrong["embedding"] = dataclasses.replace(wrong["embedding"], layout=make_layout((100, 256)))
        assert checkpointer.restore(tmp_path / "x", wrong)["embedding"].shape == (100, 256)
    with pytest.raises(ValueError, match=r"embedding: the target has bfloat16\[100,256\]"):
        restore(tmp_path / "x", wrong)


def test_reads_what_plain_orbax_saved(tmp_path):
    """The headers in the leaves say what they are."""
    small = compressed_params() | {"list": [df11_jax.compress(jnp.ones((7,), jnp.bfloat16))]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", small)
    assert_same_tree(restore(tmp_path / "x"), small)
    assert_same_tree(restore(tmp_path / "x", abstract(small)), small)
    assert_same_weights(restore(tmp_path / "x", decompress=True), small)


def test_plain_manager_with_compressed_parameters(tmp_path):
    """`StandardSave` beside ours, and read by ours."""
    small = compressed_params()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(small)))
        manager.wait_until_finished()
        standard = ocp.args.StandardRestore(abstract(small))
        restored = manager.restore(0, args=ocp.args.Composite(params=standard))
        assert_same_tree(restored.params, small)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(0, args=ocp.args.Composite(params=DF11Restore()))
        assert_same_tree(restored.params, small)
