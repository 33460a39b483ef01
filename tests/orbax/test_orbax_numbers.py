"""Python's numbers, which a train state has at its beginning, and targets for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from orbax_helpers import (
    abstract,
    assert_same_tree,
    compressed_params,
    plain_params,
    restore,
    save,
    save_plain,
)

import df11_jax
from df11_jax import checkpoints

NUMBERS = {"int": 5, "negative": -3, "float": 0.1, "bool": True}


def shape(dtype):
    return jax.ShapeDtypeStruct((), dtype)


def save_with_pytree_checkpointer(path, item):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, item)


@pytest.fixture(scope="module", params=[save, save_plain])
def numbers(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "x"
    request.param(path, NUMBERS)
    return path


def test_train_state(tmp_path):
    """A new one is saved with `step=0`, and restored onto what `jax.eval_shape` makes of it."""
    transform = optax.sgd(0.1, momentum=0.9)

    def create():
        weights = plain_params()
        return TrainState.create(apply_fn=None, params=weights, tx=transform)

    state = create().replace(step=3)
    save(tmp_path / "x", state)
    back = restore(tmp_path / "x", jax.eval_shape(create))
    assert_same_tree(back, state.replace(step=np.int32(3)))
    small = state.replace(params=compressed_params())
    save(tmp_path / "y", small)
    target = abstract(small.replace(step=jnp.int32(0)))
    assert_same_tree(restore(tmp_path / "y", target), small.replace(step=np.int32(3)))


@pytest.mark.parametrize("dtypes", [("int32", "float32"), ("int8", "bfloat16")])
def test_dtypes_of_their_kind(dtypes, numbers):
    """As with `StandardRestore`, an array of the target's dtype comes back."""
    integer, floating = dtypes
    target = {
        "int": shape(f"u{integer}"),
        "negative": shape(integer),
        "float": shape(floating),
        "bool": shape(bool),
    }
    expected = {name: np.asarray(NUMBERS[name]).astype(target[name].dtype) for name in target}
    back = restore(numbers, target)
    assert all(isinstance(leaf, np.ndarray) for leaf in back.values())
    assert_same_tree(back, expected)
    if floating == "float32":
        with ocp.StandardCheckpointer() as checkpointer:
            path = numbers.with_name(integer)
            checkpointer.save(path, NUMBERS)
            checkpointer.wait_until_finished()
            assert_same_tree(checkpointer.restore(path, target), expected)
    assert restore(numbers, dict(NUMBERS), decompress=True) == NUMBERS


def test_onto_a_sharding(numbers):
    mesh = jax.make_mesh((4,), ("x",))
    where = NamedSharding(mesh, PartitionSpec())
    target = {"int": jax.ShapeDtypeStruct((), np.int32, sharding=where), "bool": jnp.array(False)}
    back = restore(numbers, target, partial_restore=True)
    assert_same_tree(back, {"int": np.int32(5), "bool": np.bool_(True)})
    assert back["int"].sharding == where
    assert isinstance(back["bool"], jax.Array)


@pytest.mark.parametrize(
    "name, dtype", [("int", "float32"), ("int", "bool"), ("float", "int32"), ("bool", "int32")]
)
def test_other_kinds_disagree(name, dtype, numbers):
    message = rf"{name}: the target has {dtype}\[\], stored is \w+\[\]$"
    with pytest.raises(ValueError, match=message):
        restore(numbers, {name: shape(dtype)}, partial_restore=True)


STORED = {
    "int": (7, "int64[]"),
    "float": (0.5, "float64[]"),
    "bool": (True, "bool[]"),
    "text": ("gelu", "a text"),
    "scalar": (jnp.int32(7), "int32[]"),
    "key": (jax.random.key(0), "key<fry>[]"),
    "array": (jnp.arange(3), "int32[3]"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "x"
    save(path, {"a": {name: value for name, (value, _) in STORED.items()}})
    return path


@pytest.mark.parametrize(
    "target, shown, agreeing",
    [
        (3, "int[]", {"int", "scalar"}),
        (1.5, "float[]", {"float"}),
        (False, "bool[]", {"bool"}),
        ("", "a text", {"text"}),
        (np.str_("x"), "a text", {"text"}),
        (print, "builtin_function_or_method[]", set()),
        (shape("float32"), "float32[]", {"float"}),
        (df11_jax.compress(jnp.zeros((), jnp.bfloat16)), "bfloat16[], compressed", set()),
    ],
)
def test_kinds_of_what_is_no_array(stored, target, shown, agreeing):
    for name, (value, description) in STORED.items():
        item = {"a": {name: target}}
        if name in agreeing:
            back = restore(stored, item, partial_restore=True)["a"][name]
            assert back == value and isinstance(back, str) == isinstance(value, str)
            continue
        with pytest.raises(ValueError) as caught:
            restore(stored, item, partial_restore=True)
        assert f"a/{name}: the target has {shown}" in str(caught.value)
        assert str(caught.value).endswith(f", stored is {description}")


def test_a_cast_makes_no_text_of_a_number(stored):
    item = {"a": {"text": shape("float32")}}
    with pytest.raises(ValueError, match=r"a/text: the target has float32\[\], stored is a text"):
        restore(stored, item, partial_restore=True, compress={"cast": True})


def test_a_compressed_target_disagrees(numbers):
    small = df11_jax.compress(jnp.zeros((), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"float: the target has bfloat16\[\], compressed"):
        restore(numbers, {"float": small}, partial_restore=True)


@pytest.mark.parametrize(
    "value, dtype",
    [(2**31, "int32"), (-1, "uint32"), (128, "int8"), (1e39, "float32"), (-1e39, "bfloat16")],
)
def test_what_does_not_fit(value, dtype, tmp_path):
    save(tmp_path / "x", {"state": {"step": value}})
    with pytest.raises(ValueError, match=f"x: state/step: .* which the target's {dtype} cannot"):
        restore(tmp_path / "x", {"state": {"step": shape(dtype)}})


def test_what_does_not_fit_on_a_device(tmp_path):
    save(tmp_path / "x", {"step": 2**40})
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"step": jax.ShapeDtypeStruct((), np.int64, sharding=where)}
    with pytest.raises(ValueError, match=r"x: step: .* which the target's int32 cannot"):
        restore(tmp_path / "x", target)


def test_what_just_fits(tmp_path):
    values = {"most": 2**31 - 1, "least": -(2**31), "inf": float("inf")}
    save(tmp_path / "x", values)
    back = restore(
        tmp_path / "x", {"most": shape("int32"), "least": shape("int32"), "inf": shape("float32")}
    )
    assert {name: leaf.item() for name, leaf in back.items()} == values


def test_arrays_are_not_converted(tmp_path):
    """Neither to another dtype nor, where the target has a number, to one."""
    saved = {"step": jnp.int32(7), "rate": jnp.float32(0.5)}
    save(tmp_path / "x", saved)
    for name, dtype in (("step", "int16"), ("rate", "float16")):
        with pytest.raises(ValueError, match=f"{name}: the target has {dtype}"):
            restore(tmp_path / "x", {name: shape(dtype)}, partial_restore=True)
    back = restore(tmp_path / "x", {"step": 0, "rate": 0.0})
    assert_same_tree(back, saved)
    assert all(isinstance(leaf, jax.Array) for leaf in back.values())


@pytest.mark.parametrize("saver", [save, save_with_pytree_checkpointer])
def test_scalars_of_numpy(saver, tmp_path):
    """Orbax stores them as numbers of Python, which programs do not take for the same."""
    saved = {"step": np.int32(5), "rate": np.float32(0.1), "byte": np.uint8(7)}
    saver(tmp_path / "x", saved)
    options = {} if saver is save else {"compress": {}}
    for target in (None, saved, jax.tree.map(lambda leaf: shape(leaf.dtype), saved)):
        assert_same_tree(restore(tmp_path / "x", target, **options), saved)
    where = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, where), saved)
    back = restore(tmp_path / "x", placed)
    assert_same_tree(back, saved)
    assert all(leaf.sharding == where for leaf in back.values())
    loaded = checkpoints.load(tmp_path / "x")
    assert_same_tree(loaded, saved)


@pytest.mark.parametrize("saver", [save, save_plain])
def test_arrays_of_types_that_jax_lacks(saver, tmp_path):
    """On the host: on a device, 64-bit integers would silently be others."""
    with jax.enable_x64(True):
        saved = {"seen": jnp.array([2**40 + 7, -1]), "rate": jnp.array(1 / 3)}
        assert saved["seen"].dtype == np.int64
        saver(tmp_path / "x", saved)
    expected = {"seen": np.array([2**40 + 7, -1]), "rate": np.array(1 / 3)}
    options = {} if saver is save else {"compress": {}}
    (device,) = jnp.zeros(()).devices()
    where = jax.sharding.SingleDeviceSharding(device)
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), expected
    )
    for item in (None, target):
        back = restore(tmp_path / "x", item, **options)
        assert_same_tree(back, expected)
        assert all(isinstance(leaf, np.ndarray) for leaf in back.values())
