"""Layers along another axis than the first, brought to the front as leaves are read or saved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax_helpers import abstract, assert_same_tree, restore, save, save_plain
from payloads import random_weights

import df11_jax
from df11_jax.orbax import DF11Restore, DF11Save

MOVED = {"stacked": "^layers/", "stack_axis": 1}


def params():
    return {
        "layers": {
            "up": random_weights((128, 3, 192), seed=1),
            "norm": jnp.ones((128, 3), jnp.bfloat16),
            "router": jnp.arange(384.0).reshape(128, 3),
            "noise": jax.random.bits(jax.random.key(0), (128, 3, 64), jnp.uint16).view(
                jnp.bfloat16
            ),
        },
        "embedding": random_weights((200, 128), seed=2),
        "step": 3,
    }


@pytest.mark.parametrize("saver", [save, save_plain])
@pytest.mark.parametrize("targeted", [False, True])
def test_restore(saver, targeted, tmp_path):
    plain = params()
    del plain["step"]
    saver(tmp_path / "x", plain)
    target = abstract(plain) if targeted else None
    expected = df11_jax.compress_params(plain, **MOVED)
    assert expected["layers"]["up"].stack_shape == (3,)
    assert expected["layers"]["noise"].shape == (3, 128, 64)
    assert_same_tree(restore(tmp_path / "x", target, compress=MOVED), expected)


def test_save(tmp_path):
    plain = params()
    save(tmp_path / "x", plain, compress=MOVED)
    assert_same_tree(restore(tmp_path / "x"), df11_jax.compress_params(plain, **MOVED))


def test_shardings_move_with_their_axes(tmp_path):
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    split = jax.NamedSharding(mesh, jax.P("d"))
    ones = {name: jnp.ones((128, 3), name) for name in ("bfloat16", "float32")}
    plain = {"layers": jax.device_put(ones, split)}
    save_plain(tmp_path / "x", plain)
    # Without a target, what might have been compressed goes to the default device.
    for target, names in ((None, ["float32"]), (abstract(plain), ones)):
        layers = restore(tmp_path / "x", target, compress=MOVED)["layers"]
        for name in names:
            assert layers[name].shape == (3, 128)
            moved = jax.NamedSharding(mesh, jax.P(None, "d"))
            assert layers[name].sharding.is_equivalent_to(moved, 2)


@pytest.mark.parametrize("saver", [save, save_plain])
def test_names_of_axes_move_with_them(saver, tmp_path):
    """In the target, variables of nnx name the axes in the order that was stored."""
    weights = {"up": random_weights((128, 3, 192)), "norm": jnp.ones((128, 3), jnp.bfloat16)}
    names = {"up": ("in", "layers", "out"), "norm": ("in", "layers")}
    with nnx.use_eager_sharding(False):
        made = {name: nnx.Param(w, out_sharding=names[name]) for name, w in weights.items()}
    state = nnx.State({"layers": made})
    saver(tmp_path / "x", state)
    layers = restore(tmp_path / "x", abstract(state), compress=MOVED)["layers"]
    assert layers["up"].get_metadata("out_sharding") == ("layers", "in", "out")
    assert layers["norm"].get_metadata("out_sharding") == ("layers", "in")
    expected = df11_jax.compress_params({"layers": weights}, **MOVED)["layers"]
    for name, leaf in expected.items():
        assert_same_tree(layers[name].get_raw_value(), leaf)


def test_errors(tmp_path):
    plain = params()
    del plain["step"]
    save_plain(tmp_path / "x", plain)
    disagreement = r"^layers/.*: expected 128 layers|stack_axis=1"
    wrong = plain | {"layers": plain["layers"] | {"more": np.ones((64, 3, 2), np.float32)}}
    save_plain(tmp_path / "wrong", wrong)
    with pytest.raises(ValueError, match=disagreement):
        restore(tmp_path / "wrong", compress={"stacked": "^layers/"})
    with pytest.raises(ValueError, match=disagreement):
        save(tmp_path / "y", wrong, compress={"stacked": "^layers/"})
    target = abstract(plain)
    target["layers"]["up"] = df11_jax.compress(plain["layers"]["up"], stack_axes=1)
    with pytest.raises(ValueError, match=r"layers/up: stack_axis moves an axis.*plain leaves"):
        restore(tmp_path / "x", target, compress=MOVED)


@pytest.mark.parametrize("argument", ["include", "stacked"])
def test_patterns_that_are_found_nowhere(argument, tmp_path):
    plain = params()
    options = {argument: "^blocks/"}
    found = rf"{argument}='\^blocks/' is found in no path"
    with pytest.warns(UserWarning, match="DF11Save: " + found) as warned:
        save(tmp_path / "x", plain, compress=options)
    assert len(warned) == 1
    save_plain(tmp_path / "y", plain)
    with pytest.warns(UserWarning, match="DF11Restore: " + found) as warned:
        restore(tmp_path / "y", compress=options)
    assert len(warned) == 1
    # A pattern that some leaves have is found, although they are compressed one by one.
    restore(tmp_path / "y", compress={argument: "^layers/up"})


def test_stacks_that_have_been_moved_already(tmp_path):
    small = df11_jax.compress_params(params(), **MOVED)
    message = "layers/up: is compressed already, .* leave out stack_axis=1"
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "x", small, compress=MOVED)
    save(tmp_path / "y", params(), compress=MOVED)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path / "y", compress=MOVED)
    assert_same_tree(restore(tmp_path / "y", compress={"stacked": "^layers/"}), small)


@pytest.mark.parametrize(
    "made", [lambda o: DF11Save({}, compress=o), lambda o: DF11Restore(compress=o)]
)
def test_what_are_no_arguments(made):
    with pytest.raises(TypeError, match="compress has 'stakced', and compress_params no such"):
        made({"stakced": "^layers/"})
    for wrong in (True, False, "layers/"):
        with pytest.raises(TypeError, match=f"compress: expected a dict of .* got {wrong!r}"):
            made(wrong)
    with pytest.raises(TypeError, match="compress has 'like', which needs a whole tree"):
        made({"like": {}})
    with pytest.raises(TypeError, match="compress has 'shardings', but what is saved stays"):
        made({"shardings": None})
    with pytest.raises(ValueError, match="is not a regular expression"):
        made({"stacked": "("})


def test_of_a_train_state_the_parameters_are_compressed(tmp_path):
    weights = {"layers": {"up": random_weights((128, 3, 192))}}
    state = {"params": weights, "opt_state": {"mu": weights}}
    save_plain(tmp_path / "x", state)
    options = {"stacked": "layers/", "stack_axis": 1}
    small = df11_jax.compress_params(state, **options)
    assert_same_tree(restore(tmp_path / "x", compress=options), small)
    assert small["opt_state"]["mu"]["layers"]["up"].shape == (128, 3, 192)
    # Boxes of a target are gone where compression moves axes.
    boxed = jax.tree.map(lambda a: nn.LogicallyPartitioned(a, ("in", "layers", "out")), state)
    save_plain(tmp_path / "boxed", boxed)
    target = abstract({"params": boxed["params"]})
    part = restore(tmp_path / "boxed", target, compress=options, partial_restore=True)
    assert_same_tree(part, {"params": small["params"]})
