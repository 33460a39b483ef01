"""What is saved can be loaded, and what cannot be loaded is not saved."""

import collections
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_files import corrupt, save_unchecked
from payloads import check_leaves_without_elements, random_weights
from safetensors.numpy import save_file

import df11_jax
from df11_jax import DF11Array, checkpoints, published
from df11_jax._files.safetensors import TensorFile
from df11_jax.checkpoints.convert import write_native, write_orbax, write_plain

KEYS = st.one_of(
    st.text(max_size=3), st.sampled_from(["__metadata__", "a/b", "a:b", "\ud800", "0", "ü\n"])
)
TREES = st.recursive(
    st.sampled_from([None, 0, 1]),
    lambda trees: st.one_of(
        st.dictionaries(KEYS, trees, max_size=3),
        st.dictionaries(st.integers(-(2**70), 2**70), trees, max_size=2),
    ),
    max_leaves=6,
)
LEAVES = {0: np.arange(3, dtype=np.int16), 1: df11_jax.compress(random_weights((96, 64)))}


def with_leaves(tree):
    if isinstance(tree, dict):
        return {key: with_leaves(value) for key, value in tree.items()}
    return LEAVES.get(tree)


def as_bits(tree):
    """A tree with text in place of its arrays."""
    if isinstance(tree, dict):
        return {key: as_bits(value) for key, value in tree.items()}
    arrays = tree.payload if isinstance(tree, DF11Array) else [tree]
    return None if tree is None else [np.asarray(array).tobytes() for array in arrays]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=TREES, directory=st.booleans())
def test_trees_come_back_or_are_refused(tmp_path, tree, directory):
    params = with_leaves(tree)
    path = tmp_path / ("x" if directory else "x.safetensors")
    try:
        checkpoints.save(params, path, max_shard_size=100, overwrite=True)
    except ValueError as error:
        assert re.search(r"can be saved|nothing to save|cannot hold|no Unicode text", str(error))
        return
    assert as_bits(checkpoints.load(path)) == as_bits(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"__metadata__": jnp.zeros(1)}, "__metadata__: safetensors files cannot hold a tensor"),
        ({"a": {"\ud800": jnp.zeros(1)}}, r"'a/\\ud800': is no Unicode text"),
        ({"w" * 1001: jnp.zeros(1)}, "a name of 1,001 characters, expected up to 1,000"),
        ({"a": {"b": "llama"}}, "a/b: expected an array or a number, got str"),
        (
            {"a": {"b": 2**64}},
            "a/b: expected a number of at most 64 bits, got 18446744073709551616",
        ),
        ({"a": {"b": np.ma.masked_array([1, 2], [0, 1])}}, "a/b: expected an array, got a masked"),
        ({"a": {"b": None}}, "there is no array in it"),
        ({"b": [jnp.zeros(1)]}, "b/0: only nested dicts can be saved.*; b is no dict.*orbax"),
        ({"a": {(1, 2): jnp.zeros(1)}}, "only nested dicts can be saved"),
        ({"a": jnp.zeros(1), "b": jnp.zeros(1, jnp.int4)}, "b: safetensors files cannot hold"),
        ({"a": {"b": jax.random.key(0)}}, "a/b: safetensors .* the dtype key.*random.key_data"),
        ({"a": corrupt(LEAVES[1])}, "a: is corrupt: chunk 0 of slice 0"),
    ],
)
def test_what_is_refused(tmp_path, params, message):
    for path in (tmp_path / "x", tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match=message):
            checkpoints.save(params, path)
    assert not list(tmp_path.iterdir())


def test_numbers_are_kept_as_they_are(tmp_path):
    numbers = {"rate": 0.1, "most": 1e300, "count": -(2**40), "flag": True}
    checkpoints.save(numbers, tmp_path / "x.safetensors")
    loaded = checkpoints.load(tmp_path / "x.safetensors")
    assert {name: array.item() for name, array in loaded.items()} == numbers


@pytest.mark.parametrize("is_compressed", [False, True])
def test_leaves_without_elements(tmp_path, is_compressed):
    leaf = random_weights((96, 64))
    leaf = df11_jax.compress(leaf) if is_compressed else leaf
    check_leaves_without_elements(leaf, lambda a: checkpoints.save({"a": {"b": a}}, tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_empty_stacks(tmp_path):
    stack = df11_jax.compress(random_weights((2, 96, 64)), stack_axes=1)
    empty = DF11Array.from_payload([part[:0] for part in stack.payload], stack.layout)
    with pytest.raises(ValueError, match=r"w: is an empty stack, .* nothing can be saved"):
        checkpoints.save({"w": empty}, tmp_path / "x")
    # Nor do they come from plain checkpoints, where nothing is compressed that is so small.
    path = model_files.write_model(tmp_path / "plain", {"w": np.zeros((0, 96, 64), jnp.bfloat16)})
    write_native(checkpoints.open_checkpoint(path), tmp_path / "native")
    assert checkpoints.load(tmp_path / "native")["w"].shape == (0, 96, 64)


@pytest.mark.slow
def test_a_header_that_is_too_long_for_readers(tmp_path):
    names = {"w" * 900 + f"{i:06}": np.zeros(0, np.uint8) for i in range(110_000)}
    with pytest.raises(ValueError, match=r"110,000 tensors need a header of up to .* divide them"):
        checkpoints.save(names, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_native, write_orbax, write_plain])
def test_names_of_leaves_and_of_containers_at_once(tmp_path, write):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(1), "a/b": np.zeros(1)}, path)
    source = checkpoints.open_checkpoint(path)
    if write is write_plain:  # which has no containers
        write(source, tmp_path / "y")
        assert set(checkpoints.open_checkpoint(tmp_path / "y").tensors) == {"a", "a/b"}
        return
    with pytest.raises(ValueError, match=r"(a/b: a is a leaf as well|a: is a leaf, and there)"):
        write(source, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_published_checkpoint_with_the_name_of_no_tensor(tmp_path):
    tensors = {"a": {"weight": random_weights((16, 8))}, "__metadata__": np.ones(3)}
    with pytest.raises(ValueError, match="__metadata__: safetensors files cannot hold a tensor"):
        published.write(tensors, tmp_path / "x", {"a": []})


def test_the_structure_is_checked(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.save({1: {"a": np.zeros(3, np.uint8), "b": None}}, path)
    content = path.read_bytes()
    structure = TensorFile(path).metadata["structure"]
    assert json.loads(structure) == {"integers": ["1"], "none": ["1/b"]}
    for changed in (
        '{"integers": ["1"], "none": ["1/a"]}',
        '{"integers": ["1/a"], "none": []}',
        '{"integers": "1", "none": [     ]}',
        '{"integers": [1], "none": []     }',
        '{"integer": ["1"], "none": []    }',
        "[" * len(structure),
        "1" * len(structure),
    ):
        quoted = [json.dumps(text)[1:-1].encode() for text in (structure, changed)]
        quoted[1] = quoted[1].ljust(len(quoted[0]))
        assert content.count(quoted[0]) == 1
        path.write_bytes(content.replace(*quoted))
        with pytest.raises(ValueError, match=rf"{path}: "):
            checkpoints.load(path)


@pytest.mark.parametrize(
    ("size", "count"), [(1, 3), (40, 3), (80, 2), ("0.12 KB", 1), ("2GB", 1), ("1KiB", 1)]
)
def test_sizes_of_shards(tmp_path, size, count):
    tree = {name: np.zeros(40, np.uint8) for name in "abc"}
    checkpoints.save(tree, tmp_path / "x", max_shard_size=size)
    shards = list((tmp_path / "x").glob("*.safetensors"))
    assert len(shards) == count
    assert set(checkpoints.load(tmp_path / "x")) == set(tree)


def test_a_file_or_a_link_to_nothing_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, what in (("file", "a file"), ("link", "a link to nothing")):
        with pytest.raises(FileExistsError, match=f"{name}: exists already, and is {what}; expec"):
            checkpoints.save({"a": np.zeros(1)}, tmp_path / name)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("size", ["big", "-1", 0, "0GB", 1.5])
def test_what_is_no_size(tmp_path, size):
    with pytest.raises((ValueError, TypeError), match=r"size|max_shard_size"):
        checkpoints.save({"a": np.zeros(1)}, tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


def test_overwriting_a_directory(tmp_path):
    path = tmp_path / "x"
    for seed in range(3):
        tree = {f"{i} of {seed}": np.full(40, seed, np.uint8) for i in range(2)}
        checkpoints.save(tree, path, max_shard_size=40, overwrite=True)
        assert as_bits(checkpoints.load(path)) == as_bits(tree)
    before = as_bits(checkpoints.load(path))
    with pytest.raises(FileExistsError, match="exists already, and is not empty") as refused:
        checkpoints.save(tree, path)
    assert refused.value.__notes__ == [
        "df11_jax: overwrite=True replaces a whole native checkpoint"
    ]
    with pytest.raises(ValueError, match="w: is corrupt"):
        checkpoints.save({"a": np.zeros(9), "w": corrupt(LEAVES[1])}, path, overwrite=True)
    assert as_bits(checkpoints.load(path)) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_permissions_are_kept(tmp_path):
    for path in (tmp_path / "x", tmp_path / "x.safetensors"):
        checkpoints.save({"a": np.zeros(1)}, path)
        path.chmod(0o700 if path.is_dir() else 0o600)
        before = path.stat().st_mode
        checkpoints.save({"a": np.ones(1)}, path, overwrite=True)
        assert path.stat().st_mode == before


def test_the_working_directory_is_not_overwritten(tmp_path, monkeypatch):
    checkpoints.save({"a": np.zeros(1)}, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    for path in (".", tmp_path / "x"):
        with pytest.raises(FileExistsError, match="this process works in this one"):
            checkpoints.save({"a": np.ones(1)}, path, overwrite=True)
    assert os.listdir() and checkpoints.load(".")["a"] == 0


def test_more_shards_than_files_that_can_be_open(tmp_path):
    program = f"""
import resource
import numpy as np
from df11_jax import checkpoints
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
params = {{str(i): np.zeros(1) for i in range(100)}}
checkpoints.save(params, {str(tmp_path / "x")!r}, max_shard_size=1)
try:
    checkpoints.load({str(tmp_path / "x")!r})
except OSError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True
    )
    assert re.search(r"Too many open files: '.*/model-\d+-of-00100\.safetensors'", result.stdout)
    assert len(checkpoints.load(tmp_path / "x")) == 100


def test_keys_that_are_told_apart_by_their_type_alone(tmp_path):
    for params in (
        collections.OrderedDict([(1, np.zeros(1)), ("1", np.ones(1))]),
        collections.OrderedDict([(1, {"b": np.zeros(1)}), ("1", {"c": np.ones(1)})]),
        collections.OrderedDict([(1, None), ("1", np.ones(1))]),
    ):
        with pytest.raises(ValueError, match="1: an integer and a string with the same digits"):
            checkpoints.save(params, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_names_whose_parts_would_be_too_long(tmp_path):
    params = {"a": np.zeros(9), "w" * 990: LEAVES[1]}
    with pytest.raises(ValueError, match=r"a name of 1,004 characters"):
        checkpoints.save(params, tmp_path / "x", max_shard_size=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["plain", "published", "anything", "file", "damaged", "more"])
def test_only_native_directories_are_overwritten(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "plain":
        model_files.write_model(path, {"a": np.zeros(1, np.float32)})
    elif kind == "published":
        published.write({"a": {"weight": random_weights((16, 8))}}, path, {"a": []})
    elif kind == "file":
        path.write_text("mine")
    elif kind == "more":
        checkpoints.save({"a": np.zeros(9)}, path)
        (path / "notes").mkdir()
        (path / "notes" / "thesis.txt").write_text("mine")
    elif kind == "damaged":
        checkpoints.save({"a": np.zeros(9)}, path)
        next(path.glob("*.safetensors")).write_bytes(b"damaged")
    else:
        path.mkdir()
        (path / "file").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(
        FileExistsError, match=r"x: (overwrite=True replaces the whole|exists already)"
    ):
        checkpoints.save({"a": np.zeros(1)}, path, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_overwriting_what_an_interrupted_save_has_left(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="w: is corrupt"):
        bad = {"a": np.zeros(9), "w": corrupt(LEAVES[1])}
        checkpoints.save(bad, path, max_shard_size=72)
    assert list(path.glob("*.safetensors"))
    checkpoints.save({"a": np.ones(9)}, path, overwrite=True)
    assert np.array_equal(checkpoints.load(path)["a"], np.ones(9))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_savers_that_are_killed_lose_nothing(tmp_path, name):
    """Two at a time, killed at several places of their work."""
    path = tmp_path / name
    known = [{f"w{i}": np.full(2000, seed, np.uint8) for i in range(3)} for seed in range(3)]
    checkpoints.save(known[0], path, max_shard_size=2000)
    program = f"""
import os, signal, sys
import numpy as np
from df11_jax import checkpoints
seed, left = int(sys.argv[1]), int(sys.argv[2])
def counting(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
tree = {{f"w{{i}}": np.full(2000, seed, np.uint8) for i in range(3)}}
for call in ("fsync", "replace", "unlink", "open", "rename", "rmdir"):
    setattr(os, call, counting(getattr(os, call)))
checkpoints.save(tree, {str(path)!r}, max_shard_size=2000, overwrite=True)
"""
    for left in (1, 3, 5, 8, 11):
        command = [sys.executable, "-P", "-c", program]
        both = [subprocess.Popen([*command, str(seed), str(left + seed)]) for seed in (1, 2)]
        for process in both:
            process.wait()
        found = as_bits(checkpoints.load(path))
        assert found in [as_bits(tree) for tree in known]
    checkpoints.save(known[0], path, overwrite=True)
    assert as_bits(checkpoints.load(path)) == as_bits(known[0])
    assert os.listdir(tmp_path) == [name]


def test_damage_in_a_payload_is_found_when_it_is_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    save_unchecked({"w": LEAVES[1]}, path)
    checkpoints.load(path)
    content = bytearray(path.read_bytes())
    opened = TensorFile(path)
    begin = len(content) - max(entry.end for entry in opened.entries.values())
    for part in ("exponents", "sign_mantissa"):
        at = begin + opened.entries[f"w:{part}"].begin + 40
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: w: is corrupt: chunk 0 of slice 0"):
            checkpoints.load(path)
        assert isinstance(checkpoints.load(path, verify=False)["w"], DF11Array)
        content[at] ^= 1
