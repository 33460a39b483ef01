import os

import jax
import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from native_files import corrupt, save_unchecked
from payloads import assert_same_bits, random_weights
from safetensors.flax import save_file

import df11_jax
from df11_jax import DF11Array, checkpoints
from df11_jax.checkpoints._native_format import METADATA
from df11_jax.checkpoints.convert import write_native, write_orbax


def params():
    return df11_jax.compress_params(
        {
            "layers": {"kernel": random_weights((2, 256, 64))},
            "bias": jnp.arange(10, dtype=jnp.bfloat16),
            "host": np.arange(3, dtype=np.uint8),
            "step": 7,
        },
        stacked="^layers",
    )


def assert_same(loaded, tree):
    kernel = tree["layers"]["kernel"]
    assert isinstance(loaded["layers"]["kernel"], DF11Array)
    assert repr(loaded["layers"]["kernel"]) == repr(kernel)
    for a, b in zip(loaded["layers"]["kernel"].payload, kernel.payload, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same_bits(loaded["bias"], tree["bias"])
    np.testing.assert_array_equal(loaded["host"], tree["host"])
    assert loaded["step"] == tree["step"]
    assert set(loaded) == set(tree)


def test_round_trip_of_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    tree = params()
    checkpoints.save(tree, path)
    assert_same(checkpoints.load(path), tree)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_round_trip_of_a_directory(tmp_path):
    tree = params()
    checkpoints.save(tree, tmp_path / "model", max_shard_size=24)
    assert_same(checkpoints.load(tmp_path / "model"), tree)
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert names[0] == "model-00001-of-00003.safetensors"
    assert names[-1] == "model.safetensors.index.json"
    with pytest.raises(FileExistsError, match="exists already"):
        checkpoints.save(tree, tmp_path / "model")


def test_a_model_without_parameters(tmp_path):
    for path in (tmp_path / "file.safetensors", tmp_path / "directory"):
        checkpoints.save({}, path)
        assert checkpoints.load(path) == {}


def test_what_is_no_checkpoint(tmp_path):
    checkpoints.save({}, tmp_path / "file.safetensors")
    with open(tmp_path / "file.safetensors", "rb") as file:
        for other in (None, 3, b"file", {"a": 1}, file):
            with pytest.raises(TypeError, match=r"load: expected the path .* got ") as refused:
                checkpoints.load(other)
            assert repr(other)[:20] in str(refused.value)


def test_keys_that_are_empty_or_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoints.save({"": jnp.zeros(1), "tensor": {"": jnp.zeros(2), "b": jnp.zeros(3)}}, path)
    sizes = jax.tree.map(jnp.size, checkpoints.load(path))
    assert sizes == {"": 1, "tensor": {"": 2, "b": 3}}
    checkpoints.save({0: jnp.zeros(1), 10: {"a": {-1: jnp.zeros(2)}}}, path)
    assert jax.tree.map(jnp.size, checkpoints.load(path)) == {0: 1, 10: {"a": {-1: 2}}}


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoints.save(params(), path)
    before = path.read_bytes()
    array = jnp.zeros(1)
    for bad in ({"a/b": array}, {"a": [array]}, {"a:b": array}, {True: array}, {2.5: array}, array):
        with pytest.raises(ValueError, match="only nested dicts"):
            checkpoints.save(bad, path)
    with pytest.raises(ValueError, match="b: safetensors files cannot hold the dtype int4"):
        checkpoints.save({"a": jnp.zeros(9), "b": jnp.zeros(1, jnp.int4)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_leaves_no_directory(tmp_path):
    with pytest.raises(ValueError, match="b: safetensors files cannot hold the dtype int4"):
        checkpoints.save({"b": jnp.zeros(1, jnp.int4)}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_starts_anew(tmp_path):
    bad = params() | {"zzz": corrupt(df11_jax.compress(random_weights((256, 256))))}
    with pytest.raises(ValueError, match="zzz: is corrupt"):
        checkpoints.save(bad, tmp_path / "model", max_shard_size="100 B")
    with pytest.raises(ValueError, match="is incomplete"):
        checkpoints.load(tmp_path / "model")
    tree = params() | {"layers": {"kernel": df11_jax.compress(random_weights((256, 256), 5))}}
    checkpoints.save(tree, tmp_path / "model", max_shard_size=24)
    assert_same(checkpoints.load(tmp_path / "model"), tree)
    assert len(list((tmp_path / "model").iterdir())) == 4  # three shards and their index


def test_loads_other_formats_compressed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
    weights = model_files.tensors()
    path = model_files.write_model(tmp_path / "plain", weights)
    loaded = checkpoints.load(path, progress=True)
    assert "load: 100%" in capsys.readouterr().err
    assert set(loaded) == set(weights)
    compressed = {name for name, leaf in loaded.items() if isinstance(leaf, DF11Array)}
    expected = df11_jax.compress_params({k: jnp.asarray(v) for k, v in weights.items()})
    assert compressed == {name for name, leaf in expected.items() if isinstance(leaf, DF11Array)}
    assert "cube" in compressed and "incompressible" not in compressed
    for name, leaf in df11_jax.decompress_params(loaded).items():
        assert np.asarray(leaf).tobytes() == weights[name].tobytes()


def test_what_is_loaded_does_not_need_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    tree = params()
    checkpoints.save(tree, path)
    loaded = checkpoints.load(path)
    with open(path, "r+b") as file:  # in place, which a mapping would see
        file.write(bytes(path.stat().st_size))
    assert_same(loaded, tree)


def test_types_that_jax_lacks_stay_on_the_host(tmp_path):
    path = tmp_path / "model.safetensors"
    big = np.array([1 << 40, -1])
    checkpoints.save({"big": big}, path)
    loaded = checkpoints.load(path)["big"]
    assert isinstance(loaded, np.ndarray)
    np.testing.assert_array_equal(loaded, big)


def everywhere(spec=()):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def write_as(format_, weights, tmp_path):
    """Writes weights as a checkpoint of a format, and returns its path."""
    path = model_files.write_model(
        tmp_path / "plain", {name: np.asarray(array) for name, array in weights.items()}
    )
    if format_ == "plain":
        return path
    write = {"native": write_native, "orbax": write_orbax}[format_]
    write(checkpoints.open_checkpoint(path), tmp_path / "it")
    return tmp_path / "it"


@pytest.mark.parametrize("format_", ["plain", "native", "orbax"])
@pytest.mark.parametrize("where", ["device", "memory", "mesh"])
def test_where_leaves_go(tmp_path, format_, where):
    weights = {"w": random_weights((256, 128)), "one": random_weights((7,))}
    path = write_as(format_, weights, tmp_path)
    last = jax.devices()[-1]
    device = {
        "device": last,
        "memory": jax.sharding.SingleDeviceSharding(last, memory_kind="pinned_host"),
        "mesh": everywhere(),
    }[where]
    expected = jax.sharding.SingleDeviceSharding(last) if where == "device" else device
    loaded = checkpoints.load(path, device=device)
    assert isinstance(loaded["w"], DF11Array)
    for array in jax.tree.leaves(loaded):
        assert array.committed
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        assert array.sharding.memory_kind == expected.memory_kind
    if where != "memory":
        for name, array in df11_jax.decompress_params(loaded).items():
            assert_same_bits(array, weights[name])


@pytest.mark.parametrize("where", [None, "memory"])
@pytest.mark.parametrize("format_", ["plain", "native", "orbax"])
def test_layers_one_by_one_have_arrays_of_equal_shapes(tmp_path, format_, where):
    weights = {f"layers.{i}.w": np.array(random_weights((256, 128), i)) for i in range(3)}
    weights["layers.1.w"][:128] = 1
    path = write_as(format_, weights, tmp_path)
    memory = jax.sharding.SingleDeviceSharding(jax.devices()[-1], memory_kind="pinned_host")
    loaded = checkpoints.load(path, device=where and memory)
    assert len({a.exponents.shape for a in loaded.values()}) == 1
    if where:
        assert {array.sharding for array in jax.tree.leaves(loaded)} == {memory}
    for name, a in jax.device_put(loaded, jax.memory.Space.Device).items():
        assert_same_bits(df11_jax.decompress(a), weights[name])


@pytest.mark.parametrize("format_", ["plain", "native", "orbax"])
def test_with_a_mesh_that_is_set(tmp_path, format_):
    """As without: `jax.numpy.array` would copy all weights to each device of the mesh."""
    weights = {"w": random_weights((256, 128)), "norm": random_weights((64,))}
    path = write_as(format_, weights, tmp_path)
    rows = everywhere("x")
    with jax.set_mesh(rows.mesh):
        loaded = checkpoints.load(path)
        total = jax.jit(lambda p: df11_jax.decompress_params(p)["w"].sum())(loaded)
        divided = checkpoints.load(path, device=rows)
    (default,) = jax.device_put(0).devices()
    assert isinstance(loaded["w"], DF11Array)
    assert all(a.devices() == {default} and not a.committed for a in jax.tree.leaves(loaded))
    assert total == weights["w"].sum()
    assert divided["w"].sharding.is_equivalent_to(rows, 2)
    for tree in (loaded, divided):
        for name, leaf in df11_jax.decompress_params(tree).items():
            assert_same_bits(leaf, weights[name])


@pytest.mark.parametrize("format_", ["plain", "native", "orbax"])
def test_where_transfers_are_forbidden(tmp_path, format_):
    weights = {"w": random_weights((256, 128)), "norm": random_weights((64,))}
    path = write_as(format_, weights, tmp_path)
    with jax.transfer_guard("disallow"):  # unless they are explicit
        loaded = checkpoints.load(path)
        placed = checkpoints.load(path, device=jax.devices()[0])
    for tree in (loaded, placed):
        assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(tree))
        for name, leaf in df11_jax.decompress_params(tree).items():
            assert_same_bits(leaf, weights[name])


def test_places_that_do_not_suit(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoints.save({"big": np.array([1 << 40, -1]), "w": np.ones((3, 5), np.float32)}, path)
    with pytest.raises(ValueError) as caught:
        checkpoints.load(path, device=everywhere("x"))
    assert caught.value.__notes__ == [f"df11_jax: {path}: while placing the leaf w"]
    # What jax lacks a type for is on the host, as ever.
    assert checkpoints.load(path, device=jax.devices()[-1])["big"].dtype == np.int64


def test_bad_files(tmp_path):
    path = tmp_path / "bad.safetensors"
    parts = dict(
        zip(
            ("header", "codebook", "chunk_offsets", "exponents", "sign_mantissa"),
            params()["layers"]["kernel"].payload,
            strict=True,
        )
    )

    def check(changes, message, metadata=METADATA):
        kept = {k: v for k, v in (parts | changes).items() if v is not None}
        save_file({f"w:{k}": v for k, v in kept.items()}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"bad\.safetensors: " + message):
            checkpoints.load(path)

    check({"codebook": None}, "w: expected the parts")
    check({"more": parts["header"]}, "w: expected the parts")
    check({"header": parts["header"].at[0, 0].set(9)}, "w: format version 9 is unknown")
    check({"header": parts["header"][:0]}, "w: header is uint32")
    check({"header": parts["header"][:, :0]}, "w: header is uint32")
    check({"header": parts["header"][0, 0]}, "w: header is uint32")
    check({"sign_mantissa": parts["sign_mantissa"][:, :-4]}, "w: sign_mantissa is uint32")
    check({}, "is of version '1' of the native", metadata=METADATA | {"version": "1"})

    save_file({"a": jnp.zeros(1), "a/b": jnp.zeros(1)}, path, metadata=METADATA)
    with pytest.raises(ValueError, match="a/b: a is a leaf as well"):
        checkpoints.load(path)
    # Files are read in the order of their tensors, wide types first.
    save_file({"a": jnp.zeros(1, jnp.int8), "a/b": jnp.zeros(1)}, path, metadata=METADATA)
    with pytest.raises(ValueError, match="a: is a leaf, and there are leaves below it"):
        checkpoints.load(path)


@pytest.mark.parametrize("word", [0, 3, 1000])
def test_a_corrupt_leaf_is_named_when_it_is_read(tmp_path, word):
    path = tmp_path / "bad.safetensors"
    save_unchecked({"layers/kernel": corrupt(params()["layers"]["kernel"], word)}, path)
    source = checkpoints.open_checkpoint(path)
    message = r"bad\.safetensors: layers/kernel: is corrupt: chunk \d+ of slice 1"
    with pytest.raises(ValueError, match=message):
        source.read("layers/kernel")
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path)
    assert isinstance(checkpoints.load(path, verify=False)["layers"]["kernel"], DF11Array)


def test_a_header_that_differs_within_a_stack(tmp_path):
    path = tmp_path / "bad.safetensors"
    kernel = params()["layers"]["kernel"]
    header = kernel.header.at[1, 2].add(1)
    bad = jax.tree.map(lambda a: header if a is kernel.header else a, kernel)
    save_unchecked({"w": bad}, path)
    with pytest.raises(ValueError, match="w: not all slices have a header of the shape"):
        checkpoints.open_checkpoint(path).read("w")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
