"""Manifests in which one value is another: each is refused by name, or does no harm."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax_helpers import run_python, save
from payloads import random_weights

import df11_jax
from df11_jax.orbax import _manifest

DEEP = "deep"  # stands for lists in each other
VALUES = [
    *(None, True, -1, 0, 1, 1 << 40, 1 << 63, 1 << 80, 0.5, float("nan")),
    *("", "x", "float32", "O", "i4,i8", "V8", "key<fry>", "\ud800"),
    *([], [0], [-1], [1 << 40], [1 << 63], [None], ["x"], {}, {"list": [0]}, {"dict": [["a", 0]]}),
    DEEP,
]

# Restores with each manifest of a list, in no more memory than that takes.
PROGRAM = """
import json, pathlib, resource, sys
from orbax_helpers import restore
from df11_jax.orbax import DF11CheckpointHandler
from df11_jax.orbax.items import LeafReader

path, texts = map(pathlib.Path, sys.argv[1:])
restore(path)
with open("/proc/self/status") as file:
    (kilobytes,) = [int(line.split()[1]) for line in file if line.startswith("VmData")]
limit = (kilobytes << 10) + (2 << 30)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def read_leaves():
    reader = LeafReader(path)
    for leaf in reader.leaves:
        reader.read(leaf)


for text in json.loads(texts.read_text()):
    (path / "_METADATA").write_text(text)
    handler = DF11CheckpointHandler()
    for read in (lambda: restore(path), lambda: handler.metadata(path), read_leaves):
        try:
            read()
        except (MemoryError, ValueError) as error:
            assert str(path) in str(error), (str(error), text)
        except BaseException:
            print(text)
            raise
"""


def places(value, at=()):
    """The path of each value in JSON, but for that of the whole."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*at, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*at, key))


def mutations(base):
    for at in places(base):
        for value in (*VALUES, places):  # the last stands for nothing
            changed = copy.deepcopy(base)
            parent = changed
            for key in at[:-1]:
                parent = parent[key]
            if value is places:
                del parent[at[-1]]
            else:
                parent[at[-1]] = value
            yield changed


def to_text(metadata):
    return json.dumps(metadata).replace(f'"{DEEP}"', "[" * 500 + "]" * 500)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "x"
    tree = {
        "compressed": df11_jax.compress(random_weights((2, 128, 130)), stack_axes=1),
        "tuple": (jnp.ones((2, 3)), None),
        "list": [np.ones(3), jnp.zeros((0, 3))],
        "number": 3,
        "text": "abc",
        "key": jax.random.key(0),
        "no keys": jax.random.split(jax.random.key(0), 3)[:0],
    }
    save(path, tree)
    return path


@pytest.mark.slow
def test_manifests(saved, tmp_path):
    metadata = json.loads((saved / "_METADATA").read_text())
    refused, texts = 0, []
    for changed in mutations(metadata["custom_metadata"]["df11_jax"]):
        text = to_text(metadata | {"custom_metadata": {"df11_jax": changed}})
        try:
            _manifest.Manifest.from_json(json.loads(text)["custom_metadata"]["df11_jax"], "here")
            texts.append(text)
        except ValueError as error:
            assert str(error).startswith("here: ")
            refused += 1
    assert refused > 5 * len(texts) > 0
    (tmp_path / "texts").write_text(json.dumps(texts))
    run_python(PROGRAM, shutil.copytree(saved, tmp_path / "x"), tmp_path / "texts")


def test_shardings(tmp_path):
    """Each text, JSON of its own, stands for a sharding that jax can use."""
    single = {"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}
    mesh = {
        "sharding_type": "NamedSharding",
        "shape": [1],
        "axis_names": ["x"],
        "axis_types": ["AxisType.Auto"],
        "partition_spec": ["x"],
        "device_mesh": {"mesh": [{"id": 0}]},
    }
    changed = [mesh, *mutations(mesh), *mutations(single)]
    changed += [mesh | {"partition_spec": spec} for spec in (["x", "x"], ["y"], [None] * 9)]
    changed += [mesh | {"shape": [2], "device_mesh": {"mesh": [{"id": 0}, {"id": 0}]}}]
    texts = [to_text(sharding) for sharding in changed]
    texts += ["", "3", "[]", "null", "[" * 5000, "\ud800"]
    (tmp_path / "texts").write_text(json.dumps(texts))
    program = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from df11_jax.orbax import _shardings

for text in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    sharding = _shardings.from_text(text, (2, 3))
    assert jax.device_put(jnp.ones((2, 3)), sharding).sharding == sharding
    print(type(sharding).__name__)
"""
    names = run_python(program, tmp_path / "texts").split()
    assert names[0] == "NamedSharding" and len(names) == len(texts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["leaves"][0].update(path=[1]), r"path is \[1\]"),
        (lambda data: data["leaves"][0].update(shape="12"), "compressed: shape is '12'"),
        (lambda data: data["leaves"][0].update(dtype=3), "compressed: dtype is 3"),
        (lambda data: data["leaves"][0].update(dtype="uint8"), "compressed: dtype is 'uint8'"),
        (lambda data: data["leaves"][0].update(shardings=[-1] * 5), r"shardings is \[-1"),
        (lambda data: data["leaves"][0].update(layout=3), "compressed: layout: TypeError"),
        (lambda data: data["leaves"][0].update(exponent_words=1 << 58), "exponent_words is 28"),
        (lambda data: data["leaves"][0].update(crc32="-1234567"), "crc32 is '-1234567'"),
        (lambda data: data.update(shardings=[None]), r"shardings is \[None\]"),
        (lambda data: data.update(leaves={}), "leaves is {}"),
        (lambda data: data.pop("containers"), "containers has the leaves"),
        (lambda data: data.update(containers=True), "containers has True"),
        (
            lambda data: data["containers"]["dict"].append([1.5, None]),
            r"containers has \[1\.5, None\] in a dict",
        ),
    ],
)
def test_messages_name_the_field(saved, change, said):
    data = json.loads((saved / "_METADATA").read_text())["custom_metadata"]["df11_jax"]
    change(data)
    with pytest.raises(ValueError, match=rf"^here: .* is damaged \(.*{said}"):
        _manifest.Manifest.from_json(data, "here")


def test_two_arrays_of_one_name(saved):
    data = json.loads((saved / "_METADATA").read_text())["custom_metadata"]["df11_jax"]
    pairs = {pair[0]: pair for pair in data["containers"]["dict"]}
    pairs["number"][0] = "text"
    with pytest.raises(ValueError, match="two arrays of the same name"):
        _manifest.Manifest.from_json(data, "here")
