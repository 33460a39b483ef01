import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from orbax_helpers import assert_same_tree, compressed_params, restore, save
from payloads import check_leaves_without_elements, random_weights

import df11_jax
from df11_jax.orbax import _describe, _manifest

Pair = collections.namedtuple("Pair", ["left", "right"])


def test_containers_that_come_back(tmp_path):
    small = df11_jax.compress(random_weights((128, 130)))
    tree = {
        "dict": {"b": jnp.ones(2), "a": small},
        "list": [small, jnp.zeros(1), [jnp.ones(1), {}]],
        "tuple": (jnp.ones(1), (small,), ()),
        3: {10: jnp.ones(1), 9: small},
        "none": None,
        "empty": [{}, [], (), None],
        "a.b/c": jnp.ones(3),
    }
    tree = {"keys": {3: tree.pop(3)}, **tree}
    save(tmp_path / "x", tree)
    assert_same_tree(restore(tmp_path / "x"), tree)


def test_leaves_that_come_back(tmp_path):
    tree = {
        "int": 3,
        "float": 0.1,
        "bool": True,
        "str": "text",
        "numpy": np.arange(4, dtype=np.int16),
        "numpy scalar": np.ones((), np.float64),
        "key": jax.random.key(3),
        "no keys": jax.random.split(jax.random.key(3), 2)[:0],
        "no elements": jnp.zeros((0, 3)),
        "float8": jnp.arange(4, dtype=jnp.float8_e4m3fn),
        "compressed, one element": df11_jax.compress(jnp.ones((), jnp.bfloat16)),
        "compressed, no elements": df11_jax.compress(jnp.ones((2, 0, 3), jnp.bfloat16)),
        "compressed, stack of none": df11_jax.compress(
            jnp.ones((0, 2, 3), jnp.bfloat16), stack_axes=1
        ),
        "compressed, two stack axes": df11_jax.compress(random_weights((2, 3, 7)), stack_axes=2),
    }
    save(tmp_path / "x", tree)
    back = restore(tmp_path / "x")
    assert (back.pop("key") == tree.pop("key")).all()
    assert (back["no keys"].dtype, back.pop("no keys").shape) == (tree.pop("no keys").dtype, (0,))
    assert back.pop("str") == tree.pop("str")
    for name, value in tree.items():
        # The same type of number, but for those of numpy, which are Python's in Orbax.
        assert isinstance(back[name], type(value)), name
    # What the stack of none had as its length of exponents, nothing depends on.
    none, had_none = (t.pop("compressed, stack of none") for t in (back, tree))
    assert (none.shape, none.slice_shape) == (had_none.shape, had_none.slice_shape)
    assert_same_tree(back, tree)


def test_a_single_leaf(tmp_path):
    small = df11_jax.compress(random_weights((128, 130)))
    save(tmp_path / "x", small)
    assert_same_tree(restore(tmp_path / "x"), small)
    assert_same_tree(restore(tmp_path / "x", small), small)


def test_other_containers_are_dicts_and_lists(tmp_path):
    """They come back as what they are if there is a target."""
    model = nnx.Linear(128, 128, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tree = {
        "frozen": FrozenDict(a=jnp.ones(1), b=df11_jax.compress(random_weights((128, 130)))),
        "pair": Pair(jnp.ones(1), [jnp.ones(2)]),
        "ordered": collections.OrderedDict(b=jnp.ones(1), a=jnp.ones(2)),
        "state": df11_jax.compress_params(nnx.state(model)),
    }
    save(tmp_path / "x", tree)
    back = restore(tmp_path / "x")
    assert type(back["frozen"]) is type(back["ordered"]) is type(back["state"]) is dict
    assert back["pair"]["right"][0].shape == (2,)
    assert back["state"]["kernel"]["value"].shape == (128, 128)
    assert_same_tree(restore(tmp_path / "x", tree), tree)


def test_names_that_orbax_confuses_are_refused(tmp_path):
    """Orbax alone stores one of them over the other."""
    with pytest.raises(ValueError, match=r"a\.b: Orbax stores it as 'a\.b', like a/b; rename"):
        save(tmp_path / "x", {"a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(1)})
    small = df11_jax.compress(random_weights((128, 130)))
    with pytest.raises(ValueError, match=r"Orbax stores it as 'a\.tables'"):
        save(tmp_path / "x", {"a": small, "a.tables": jnp.zeros(1)})
    assert not (tmp_path / "x").exists()


def test_leaves_that_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="a/0: Orbax cannot save a object"):
        save(tmp_path / "x", {"a": [object()]})
    # Of these, Orbax knows arrays only.
    for number in (1j, jnp.bfloat16.dtype.type(1.5), np.bool_(True)):
        name = type(number).__name__
        if isinstance(number, np.bool_):
            name = rf"numpy\.{name}"  # Python's can be saved
        with pytest.raises(TypeError, match=f"a/0: Orbax cannot save a {name}; save numpy.asarray"):
            save(tmp_path / "x", {"a": [number]})
        folder = tmp_path / type(number).__name__
        save(folder, {"a": [np.asarray(number)]})  # as it says
        assert restore(folder)["a"][0] == number


@pytest.mark.parametrize("options", [{}, {"compress": {}}])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_leaves_without_elements(tmp_path, is_compressed, options):
    leaf = random_weights((128, 130))
    leaf = df11_jax.compress(leaf) if is_compressed else leaf
    check_leaves_without_elements(leaf, lambda a: save(tmp_path / "x", {"a": {"b": a}}, **options))
    assert not (tmp_path / "x").exists()


def test_as_deep_as_can_be_restored(tmp_path):
    tree = jnp.ones(1)
    for _ in range(_manifest.MAX_DEPTH):
        tree = {"a": tree}
    save(tmp_path / "x", tree)
    assert_same_tree(restore(tmp_path / "x"), tree)
    with pytest.raises(ValueError, match="a/a: is in more than 256 containers"):
        save(tmp_path / "y", {"a": tree})


def test_json():
    manifest, _ = _describe.describe(compressed_params())
    data = manifest.to_json()
    assert (data["format"], data["version"], data["layout_version"]) == ("df11_jax.orbax", 1, 2)
    assert data["leaves"][-1] == {
        "path": "layers/up",
        "shape": [3, 128, 192],
        "dtype": "bfloat16",
        "shardings": [0, 0, 0, 0, 0],
        "layout": {
            "shape": (128, 192),
            "batch_axes": 0,
            "row_axes": 1,
            "along_columns": False,
            "steps": 8,
            "code_bits": 12,
            "parts": (),
        },
        "exponent_words": compressed_params()["layers"]["up"].exponents.shape[-1],
    }
    assert json.loads(data["shardings"][0])["sharding_type"] == "SingleDeviceSharding"
    assert _manifest.Manifest.from_json(json.loads(json.dumps(data)), "here") == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("leaves"),
        lambda data: data.pop("containers"),
        lambda data: data["leaves"].pop(),
        lambda data: data["leaves"].append({}),
        lambda data: data["leaves"][0].pop("shape"),
        lambda data: data["leaves"][0].update(shape=[-1]),
        lambda data: data["leaves"][0].update(shape=["a"]),
        lambda data: data["leaves"][0].pop("layout"),
        lambda data: data["leaves"][0].update(layout=None),
        lambda data: data["leaves"][0]["layout"].pop("steps"),
        lambda data: data["leaves"][0]["layout"].update(shape=[100, 256]),
        lambda data: data["leaves"][0]["layout"].update(shape=[1, 200, 128]),
        lambda data: data["leaves"][0]["layout"].update(shape=[1] * 9),
        lambda data: data["leaves"][0]["layout"].update(row_axes=-1),
        lambda data: data["leaves"][0]["layout"].update(row_axes=3),
        lambda data: data["leaves"][0]["layout"].update(along_columns="yes"),
        lambda data: data["leaves"][0]["layout"].update(steps=3),
        lambda data: data["leaves"][0]["layout"].update(code_bits=13),
        lambda data: data["leaves"][0]["layout"].update(parts=[3, 1]),
        lambda data: data["leaves"][0]["layout"].update(parts=[2]),
        lambda data: data["leaves"][0]["layout"].update(parts=[0, 0]),
        lambda data: data["leaves"][0]["layout"].update(parts=["a", "b"]),
        lambda data: data["leaves"][0]["layout"].update(more=1),
        lambda data: data["leaves"][0].pop("exponent_words"),
        lambda data: data["leaves"][0].update(exponent_words=-4),
        lambda data: data["leaves"][0].update(shardings=[0]),
        lambda data: data["leaves"][0].update(shardings=[0, 0, 0, 0, 7]),
        lambda data: data["leaves"][0].update(crc32="xyz"),
        lambda data: data["leaves"][0].update(dtype="xyz"),
        lambda data: data.update(leaves=None),
        lambda data: data.update(containers={"set": []}),
        lambda data: data.update(containers={"dict": [["a", 0]], "list": []}),
        lambda data: data.update(containers="abc"),
    ],
)
def test_damaged_json(change):
    data = json.loads(json.dumps(_describe.describe(compressed_params())[0].to_json()))
    change(data)
    with pytest.raises(ValueError, match="here: the metadata of df11_jax is damaged"):
        _manifest.Manifest.from_json(data, "here")


@pytest.mark.parametrize(
    "value",
    [
        np.arange(4, dtype=">f4"),
        np.array(["2020"], "datetime64[s]"),
        np.array([b"ab"]),
        np.array(["ab"]),
        np.zeros(2, [("a", "i4")]),
    ],
)
def test_what_would_not_come_back_is_refused(value):
    with pytest.raises(TypeError, match=r"a/b: Orbax (cannot save|would not give back)"):
        _describe.describe({"a": {"b": value}})
