"""The handler for `orbax.checkpoint.v1`."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from orbax_helpers import (
    abstract,
    assert_same_tree,
    compressed_params,
    plain_params,
    restore,
    run_python,
)

import df11_jax
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, DF11Save


def optimizer_state():
    return {"mu": jnp.ones((64, 64)), "count": jnp.asarray(3)}


def test_round_trip_beside_other_items(tmp_path):
    small, state = compressed_params(), optimizer_state()
    v1.save_checkpointables(tmp_path / "x", {"params": small, "opt_state": state})
    back = v1.load_checkpointables(tmp_path / "x", {"params": None, "opt_state": abstract(state)})
    assert_same_tree(back, {"params": small, "opt_state": state})
    (only,) = v1.load_checkpointables(tmp_path / "x", {"params": abstract(small)}).values()
    assert_same_tree(only, small)
    assert_same_tree(v1.load(tmp_path / "x", checkpointable_name="params"), small)


def test_async(tmp_path):
    small = compressed_params()
    expected = jax.tree.map(lambda a: np.array(a), small)
    response = v1.save_checkpointables_async(tmp_path / "x", {"params": small})
    for array in jax.tree.leaves(small):
        array.delete()
    response.result()
    assert_same_tree(v1.load_checkpointables(tmp_path / "x")["params"], expected)


def test_arguments(tmp_path):
    """`DF11Save` and `DF11Restore` are taken as well."""
    args = DF11Save(plain_params(), compress={"stacked": "^layers/"}, custom_metadata={"a": 1})
    v1.save_checkpointables(tmp_path / "x", {"params": args})

    def load(args):
        return v1.load_checkpointables(tmp_path / "x", {"params": args})["params"]

    assert_same_tree(load(None), compressed_params())
    assert_same_tree(load(DF11Restore(decompress=True)), plain_params())
    assert_same_tree(load(DF11Restore(abstract(plain_params()))), plain_params())
    part = {"head": abstract(compressed_params()["head"])}
    restored = load(DF11Restore(part, partial_restore=True))
    assert_same_tree(restored, {"head": compressed_params()["head"]})


def test_compresses_a_plain_checkpoint(tmp_path):
    v1.save(tmp_path / "x", plain_params())
    args = DF11Restore(compress={"stacked": "^layers/"})
    back = v1.load_checkpointables(tmp_path / "x", {"state": args})
    assert_same_tree(back["state"], compressed_params())


def test_training_checkpointer(tmp_path):
    small, state = compressed_params(), optimizer_state()
    always = v1.training.save_decision_policies.FixedIntervalPolicy(1)
    with v1.training.Checkpointer(tmp_path, save_decision_policy=always) as checkpointer:
        for step in range(3):
            items = {"params": small, "opt_state": state}
            checkpointer.save_checkpointables_async(step, items)
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest.step == 2
        back = checkpointer.load_checkpointables(2, {"params": None})
        assert_same_tree(back["params"], small)


def test_finds_the_handler_by_itself(tmp_path):
    v1.save_checkpointables(tmp_path / "x", {"params": compressed_params()})
    program = """
import sys, df11_jax.orbax
from orbax.checkpoint import v1
print(v1.load_checkpointables(sys.argv[1])["params"])
"""
    assert "DF11Array(bfloat16[3,128,192]" in run_python(program, tmp_path / "x")


def test_metadata(tmp_path):
    small = compressed_params()
    v1.save_checkpointables(tmp_path / "x", {"params": small})
    metadata = v1.checkpointables_metadata(tmp_path / "x").metadata["params"]
    assert str(df11_jax.size_report(metadata)) == str(df11_jax.size_report(small))
    loaded = v1.load_checkpointables(tmp_path / "x", {"params": metadata})
    assert_same_tree(loaded["params"], small)


def test_both_apis_read_each_other(tmp_path):
    small = compressed_params()
    v1.save_checkpointables(tmp_path / "x", {"params": small})
    assert_same_tree(restore(tmp_path / "x" / "params"), small)
    with ocp.CheckpointManager(tmp_path / "y") as manager:
        manager.save(0, args=ocp.args.Composite(params=DF11Save(small)))
    args = {"params": DF11Restore()}
    assert_same_tree(v1.load_checkpointables(tmp_path / "y" / "0", args)["params"], small)
    assert_same_tree(v1.load_checkpointables(tmp_path / "y" / "0")["params"], small)
    metadata = v1.checkpointables_metadata(tmp_path / "y" / "0").metadata["params"]
    assert str(df11_jax.size_report(metadata)) == str(df11_jax.size_report(small))
    with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "z", args=DF11Save(small))
    assert_same_tree(v1.load(tmp_path / "z"), small)


def test_plain_v1_alone(tmp_path):
    """`save` and `load` take compressed parameters as any pytree, given a target."""
    small = compressed_params()
    v1.save(tmp_path / "x", small)
    assert_same_tree(v1.load(tmp_path / "x", abstract(small)), small)
    assert_same_tree(restore(tmp_path / "x" / "state"), small)


def test_errors_come_as_the_cause(tmp_path):
    v1.save_checkpointables(tmp_path / "x", {"params": compressed_params()})
    target = abstract(compressed_params()) | {"more": jax.ShapeDtypeStruct((), jnp.float32)}
    with pytest.raises(KeyError, match="Failed to load checkpointable: params") as caught:
        v1.load_checkpointables(tmp_path / "x", {"params": target})
    assert "more: is not in the checkpoint" in str(caught.value.__cause__)


def test_plain_trees_are_left_to_orbax():
    handler = df11_jax.orbax.DF11Handler()
    assert not handler.is_handleable(plain_params())
    assert handler.is_handleable(compressed_params())
    assert handler.is_abstract_handleable(abstract(compressed_params()))
    assert handler.is_abstract_handleable(abstract(plain_params())) is None
    assert not handler.is_handleable("text")
    assert not handler.is_handleable({"keys that cannot be sorted": 1, 2: 3})


def test_one_name_for_years():
    """Checkpoints name their handlers."""
    for cls in (DF11CheckpointHandler, df11_jax.orbax.DF11Handler):
        assert cls.__module__ == "df11_jax.orbax"
    assert DF11CheckpointHandler.typestr() == "df11_jax.orbax.DF11CheckpointHandler"
