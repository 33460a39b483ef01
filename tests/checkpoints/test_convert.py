import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import model_files
import numpy as np
import pytest
from payloads import random_weights
from safetensors.flax import load_file, save_file

from df11_jax import checkpoints
from df11_jax._files.directory import find_tensors
from df11_jax._files.folder import Folder
from df11_jax._files.safetensors import DTYPES, TensorFile
from df11_jax.checkpoints import _shard_files, open_checkpoint
from df11_jax.checkpoints._native_format import METADATA
from df11_jax.checkpoints._plain import PlainCheckpoint
from df11_jax.checkpoints.convert import write_native, write_plain
from df11_jax.checkpoints.differences import differences

JOURNAL = "df11_jax-incomplete.json"


@pytest.fixture(scope="module")
def weights():
    return model_files.tensors()


@pytest.fixture
def plain(tmp_path, weights):
    return open_checkpoint(model_files.write_model(tmp_path / "plain", weights, shards=9))


def inodes(path):
    return {file.name: file.stat().st_ino for file in path.glob("model-*.safetensors")}


def break_source(monkeypatch, source, name):
    """Makes reading one tensor fail, as a corrupt unit would."""
    read = source.read

    def failing(wanted):
        if wanted == name:
            raise ValueError(f"{source.path}: {name}: is corrupt")
        return read(wanted)

    monkeypatch.setattr(source, "read", failing)


def test_a_file_with_a_line_feed_in_its_name_is_not_copied_over_what_is_written(tmp_path, weights):
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / "x\ny.safetensors")
    write_native(open_checkpoint(tmp_path / "plain"), tmp_path / "native")
    assert open_checkpoint(tmp_path / "native").format == "native"
    write_plain(open_checkpoint(tmp_path / "native"), tmp_path / "copy")
    model_files.assert_holds(open_checkpoint(tmp_path / "copy"), weights)


@pytest.mark.parametrize("verify", [True, False])
def test_there_and_back(tmp_path, weights, plain, verify, capsys, monkeypatch):
    monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
    write_native(plain, tmp_path / "native", verify=verify, progress=True)
    native = open_checkpoint(tmp_path / "native")
    model_files.assert_holds(native, weights)
    assert "compress: 100%" in capsys.readouterr().err

    write_plain(native, tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert back.format == "plain"
    model_files.assert_holds(back, weights)
    for path in (tmp_path / "native", tmp_path / "back"):
        shards = sorted(path.glob("*.safetensors"))
        assert len(shards) > 5
        assert not list(path.glob("*.partial")) and not (path / JOURNAL).exists()


def test_other_libraries_read_what_is_decompressed(tmp_path, weights, plain):
    write_native(plain, tmp_path / "native")
    write_plain(open_checkpoint(tmp_path / "native"), tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    assert set(index["weight_map"]) == set(weights)
    for name, file in index["weight_map"].items():
        assert TensorFile(tmp_path / "back" / file).metadata == {"format": "pt"}
        array = np.asarray(load_file(tmp_path / "back" / file)[name])
        assert array.tobytes() == weights[name].tobytes()


@pytest.mark.slow
def test_transformers_loads_what_is_decompressed(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=512,
        dtype="bfloat16",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    write_native(open_checkpoint(tmp_path / "plain"), tmp_path / "native")
    write_plain(open_checkpoint(tmp_path / "native"), tmp_path / "back")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


def test_the_same_leaves_as_compress_params(tmp_path, weights, plain):
    write_native(plain, tmp_path / "native")
    native, from_plain = (checkpoints.load(path) for path in (tmp_path / "native", plain.path))
    assert set(native) == set(weights)
    for name, leaf in native.items():
        assert repr(leaf) == repr(from_plain[name])


def test_tensors_are_aligned(tmp_path, weights):
    # An odd number of weights that turn out not to gain moves all that follows; a copy is made
    # of such tensors when they are read.
    weights = {name: array for name, array in weights.items() if name != "incompressible"}
    plain = open_checkpoint(model_files.write_model(tmp_path / "plain", weights))
    write_native(plain, tmp_path / "native")
    write_plain(plain, tmp_path / "copy")
    for path in (*tmp_path.glob("native/*.safetensors"), *tmp_path.glob("copy/*.safetensors")):
        for name, entry in TensorFile(path).entries.items():
            assert entry.begin % DTYPES[entry.dtype].itemsize == 0, name


def test_files_beside_the_weights(tmp_path, weights):
    path = model_files.write_model(tmp_path / "plain", weights)
    (path / "chat_template.jinja").write_text("{{ hello }}")
    (path / ".gitattributes").write_text("hidden")
    (path / "original").mkdir()
    for name in ("pytorch_model.bin", "other.gguf", "model.fp32.safetensors.index.json"):
        (path / name).write_bytes(b"weights")
    with open(path / "large", "wb") as file:
        file.truncate(200 * 2**20)
    config = model_files.CONFIG | {"dfloat11_config": {"version": "0.5.0"}}
    for text in (json.dumps(model_files.CONFIG, indent=7), json.dumps(config)):
        (path / "config.json").write_text(text)
        target = tmp_path / f"native {len(text)}"
        # It would be taken for a published checkpoint, which it is not.
        folder = Folder(path)
        write_native(PlainCheckpoint(folder, find_tensors(folder)), target)
        assert {file.name for file in target.iterdir()} == {
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        }
        copied = (target / "config.json").read_text()
        assert json.loads(copied) == model_files.CONFIG
        assert copied == text or "dfloat11_config" in text


def test_a_failed_run_is_incomplete_and_goes_on(tmp_path, weights, plain, monkeypatch):
    target = tmp_path / "native"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"layers\.2.* is corrupt"):
        break_source(patch, plain, "model.layers.2.mlp.up_proj.weight")
        write_native(plain, target)
    assert not list(target.glob("*.partial"))
    before = inodes(target)
    assert before
    with pytest.raises(ValueError, match="native: is incomplete"):
        open_checkpoint(target)

    (target / "model-00009-of-00009.safetensors.0123abcd.partial").write_bytes(b"from a crash")
    write_native(plain, target)
    after = inodes(target)
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before
    model_files.assert_holds(open_checkpoint(target), weights)


def test_a_journal_of_a_run_that_finished_nothing(tmp_path, weights, plain, monkeypatch):
    target = tmp_path / "native"
    target.mkdir()
    (target / JOURNAL).write_text(json.dumps({"writes": "something else"}))  # killed at once
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"layers\.2.* is corrupt"):
        break_source(patch, plain, "model.layers.2.mlp.up_proj.weight")
        write_native(plain, target)
    assert json.loads((target / JOURNAL).read_text())["from"] == str(plain.path)
    write_native(plain, target)
    model_files.assert_holds(open_checkpoint(target), weights)


def test_nothing_stays_if_nothing_was_finished(tmp_path, plain, monkeypatch):
    break_source(monkeypatch, plain, next(iter(plain.tensors)))
    (tmp_path / "empty").mkdir()
    for name in ("native", "empty"):
        with pytest.raises(ValueError, match="is corrupt"):
            write_native(plain, tmp_path / name)
    assert not (tmp_path / "native").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_a_run_that_lost_only_its_end(tmp_path, weights, plain):
    target = tmp_path / "native"
    write_native(plain, target)
    # Killed between the index and the removal of the journal.
    job = {
        "writes": f"native {json.dumps(METADATA)}",
        "from": str(plain.path),
        "files": plain.fingerprint(),
    }
    (target / JOURNAL).write_text(json.dumps(job, indent=2) + "\n")
    model_files.assert_holds(open_checkpoint(target), weights)
    before = inodes(target)
    write_native(plain, target)
    assert inodes(target) == before
    assert not (target / JOURNAL).exists()


@pytest.mark.parametrize("change", ["time", "other format", "garbage"])
def test_what_another_run_left_is_refused(tmp_path, plain, monkeypatch, change):
    target = tmp_path / "native"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is corrupt"):
        break_source(patch, plain, "model.layers.2.mlp.up_proj.weight")
        write_native(plain, target)
    before = {file: file.read_bytes() for file in target.iterdir()}
    write = write_native
    if change == "time":
        os.utime(next(plain.path.glob("*.safetensors")), ns=(1, 1))
        plain = open_checkpoint(plain.path)
        message = r"files that changed: model-0000\d-of-00009\.safetensors"
    elif change == "other format":
        write, message = write_plain, r"writes: native .*, now plain"
    else:
        before[target / JOURNAL] = b"\0" * 9
        (target / JOURNAL).write_bytes(before[target / JOURNAL])
        message = "cannot be read"
    with pytest.raises(FileExistsError, match=message):
        write(plain, target)
    assert {file: file.read_bytes() for file in target.iterdir()} == before


def test_what_is_there_is_not_touched(tmp_path, plain):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_text("mine")
    for name in ("file", "directory"):
        with pytest.raises(FileExistsError, match=f"{name}: exists already"):
            write_native(plain, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [file.name for file in (tmp_path / "directory").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    write_native(plain, tmp_path / "empty")


def test_two_at_a_time(tmp_path, plain):
    target = tmp_path / "native"
    target.mkdir()
    with open(target / JOURNAL, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is writing to it"):
            write_native(plain, target)
    write_native(plain, target)


@pytest.mark.parametrize("when", ["before the journal is opened", "after it"])
def test_another_that_finishes_just_before(tmp_path, plain, monkeypatch, when):
    target = tmp_path / "native"
    shard = target / "model-00001-of-00009.safetensors"
    flock = fcntl.flock

    def late(*args):
        shard.write_bytes(b"of the other")
        if when == "after it":
            (target / JOURNAL).unlink()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OSError, match=r"is not empty; nothing|another process was writing to it"):
        write_native(plain, target)
    assert [file.name for file in target.iterdir()] == [shard.name]
    assert shard.read_bytes() == b"of the other"


def test_names_that_the_format_cannot_hold(tmp_path):
    path = model_files.write_model(tmp_path / "plain", {"a:b": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="a:b: native checkpoints have no ':' in names"):
        write_native(open_checkpoint(path), tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_dtypes_that_numpy_lacks_are_copied(tmp_path):
    plain = open_checkpoint(model_files.write_unknown_dtype(tmp_path / "plain"))
    write_native(plain, tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    write_plain(native, tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    for source in (native, back):
        assert source.tensors["four bits"].dtype == "F4"
        assert source.tensors["four bits"].shape == (3, 16)
        assert source.read("four bits").tobytes() == bytes(range(24))
        assert not list(differences(plain, source))
    with pytest.raises(ValueError, match="four bits: has the dtype F4, which numpy lacks"):
        checkpoints.load(native)
    content = bytearray((tmp_path / "native" / "model.safetensors").read_bytes())
    content[content.index(bytes(range(24)))] ^= 1
    (tmp_path / "native" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="four bits: is corrupt"):
        open_checkpoint(tmp_path / "native").read("four bits")


def test_shards_are_filled_in_order():
    sizes = {"a": 5, "b": 2 * 10**9, "c": 1, "d": 3 * 10**9, "e": 10**9, "f": 10**9, "g": 1}
    plan = _shard_files.plan_shards(Path("x"), sizes)
    assert list(plan.values()) == [["a"], ["b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert next(iter(plan)) == Path("x/model-00001-of-00006.safetensors")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_bounded_by_one_tensor(tmp_path):
    tensor = random_weights((1024, 4096))
    path = model_files.write_model(tmp_path / "plain", {f"w{i}": tensor for i in range(20)})
    program = f"""
import re, sys
from pathlib import Path
from df11_jax.checkpoints import open_checkpoint
from df11_jax.checkpoints.convert import write_native, write_plain
from df11_jax.checkpoints.differences import differences
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
before = peak()
write_native(open_checkpoint({str(path)!r}), Path({str(tmp_path / "native")!r}))
native = peak()
write_plain(open_checkpoint({str(tmp_path / "native")!r}), Path({str(tmp_path / "back")!r}))
print(native - before, peak() - before)
"""
    output = subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True
    ).stdout
    # Of 160 MiB in tensors of 8: the tensor mapped, its encoding, and the encoding before that.
    assert max(map(int, output.split())) < 48, output


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "by": "somebody"}])
def test_a_file_becomes_a_file(tmp_path, weights, metadata):
    path = tmp_path / "plain.safetensors"
    arrays = {name: jnp.asarray(array) for name, array in weights.items()}
    save_file(arrays, path, metadata=metadata)
    native, back = tmp_path / "native.safetensors", tmp_path / "back.safetensors"
    write_native(open_checkpoint(path), native)
    assert open_checkpoint(native).format == "native"
    write_native(open_checkpoint(path), tmp_path / "directory")
    (in_directory,) = (tmp_path / "directory").iterdir()
    assert native.read_bytes() == in_directory.read_bytes()
    write_plain(open_checkpoint(native), back)
    model_files.assert_holds(open_checkpoint(back), weights)
    assert TensorFile(back).metadata == (metadata or {"format": "pt"})
    assert {file.name for file in tmp_path.iterdir()} == {
        "plain.safetensors",
        "native.safetensors",
        "back.safetensors",
        "directory",
    }


def test_what_does_not_become_a_file(tmp_path, plain):
    target = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"out\.safetensors: is a name for a file, and .*plain is"):
        write_native(plain, target)
    assert not target.exists()
    file = open_checkpoint(next(plain.path.glob("*.safetensors")))
    target.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.safetensors: exists already"):
        write_native(file, target)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_a_file_of_no_tensors(tmp_path, target):
    source = tmp_path / "plain"
    source.mkdir()
    save_file({}, source / "model.safetensors")
    if target.endswith(".safetensors"):
        source /= "model.safetensors"
    write_native(open_checkpoint(source), tmp_path / target)
    assert not open_checkpoint(tmp_path / target).tensors
    assert checkpoints.load(tmp_path / target) == {}


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path, weights, monkeypatch):
    path = model_files.write_model(tmp_path / "plain", weights) / "model.safetensors"
    source = open_checkpoint(path)
    break_source(monkeypatch, source, "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="is corrupt"):
        write_native(source, tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["plain"]
