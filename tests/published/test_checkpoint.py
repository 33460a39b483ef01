import json
import shutil

import jax
import numpy as np
import pytest
from payloads import assert_same_bits, bits
from tiny_llama import FIXTURE, LAYER, ORIGINAL, SHARDED, SINGLE, edit, load, original, save

from df11_jax import published

LAYER_WEIGHTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def open_fixture(style):
    if style == "sharded":
        return published.Checkpoint(SHARDED)
    # DFloat11 writes no config of the model beside a single file.
    return published.Checkpoint(SINGLE, ORIGINAL)


def assert_is_original(checkpoint):
    tensors = original()
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert_same_bits(checkpoint.read(name), expected)


@pytest.mark.parametrize("style", ["sharded", "single"])
def test_reads_what_the_library_wrote(style):
    checkpoint = open_fixture(style)
    assert checkpoint.format == "published"
    assert_is_original(checkpoint)
    for name, expected in original().items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (expected.shape, "BF16", expected.nbytes)


@pytest.mark.parametrize("style", ["sharded", "single"])
def test_stored_bytes_add_up(style):
    checkpoint = open_fixture(style)
    for unit in checkpoint.units.values():
        shares = [checkpoint.tensors[name].stored_nbytes for name in unit.tensors]
        assert sum(shares) == unit.compressed_nbytes
        assert unit.compressed_nbytes < 2 * sum(unit.sizes)
    total = sum(
        array.nbytes
        for file in (FIXTURE / style).glob("*.safetensors")
        for array in load(file).values()
    )
    assert sum(info.stored_nbytes for info in checkpoint.tensors.values()) == total


def test_lists_units():
    checkpoint = published.Checkpoint(SHARDED)
    assert set(checkpoint.units) == {"lm_head", "model.embed_tokens", LAYER, "model.layers.1"}
    unit = checkpoint.units[LAYER]
    assert unit.tensors == tuple(f"{LAYER}.{name}.weight" for name in LAYER_WEIGHTS)
    assert unit.shapes[:3] == ((64, 64), (32, 64), (32, 64))
    assert unit.shapes[4:] == ((96, 64), (96, 64), (64, 96))
    assert unit.sizes[:2] == (4096, 2048)
    assert unit.file == SHARDED / "model_layers_0.safetensors"
    head = checkpoint.units["lm_head"]
    assert (head.tensors, head.shapes) == (("lm_head.weight",), ((96, 64),))
    assert checkpoint.config["model_type"] == "llama"
    assert repr(checkpoint).endswith("sharded', 4 units)")


@pytest.mark.parametrize("jit", [False, True])
def test_units_decompress_as_they_are(jit):
    unit = published.Checkpoint(SHARDED).read_unit(LAYER)
    weights = (jax.jit(published.decompress) if jit else published.decompress)(unit)
    assert set(weights) == {f"{LAYER}.{name}.weight" for name in LAYER_WEIGHTS}
    tensors = original()
    for name, weight in weights.items():
        assert_same_bits(weight, tensors[name])


def test_unknown_names():
    checkpoint = published.Checkpoint(SHARDED)
    with pytest.raises(KeyError, match="there is no tensor 'lm_head'"):
        checkpoint.read("lm_head")
    with pytest.raises(KeyError, match=r"there is no unit 'lm_head\.weight'"):
        checkpoint.read_unit("lm_head.weight")


def test_a_file_by_itself(tmp_path):
    # The config beside it is used.
    assert_is_original(published.Checkpoint(SINGLE / "model.safetensors", ORIGINAL))
    head = published.Checkpoint(SHARDED / "lm_head.safetensors")
    assert set(head.tensors) == {"lm_head.weight"}
    # Any name will do, and for a unit of one tensor no pattern is needed.
    shutil.copy(SHARDED / "lm_head.safetensors", tmp_path / "x")
    head = published.Checkpoint(tmp_path / "x", {"lm_head.weight": (96, 64)})
    assert_same_bits(head.read("lm_head.weight"), original()["lm_head.weight"])
    assert head.config == {}


def test_without_config(tmp_path):
    path = shutil.copytree(SHARDED, tmp_path / "model", ignore=shutil.ignore_patterns("*.json"))
    patterns = {r"model\.layers\.\d+": LAYER_WEIGHTS}
    with pytest.raises(ValueError, match=r"unit model\.layers\.0: which 7 tensors .* pattern_dict"):
        published.Checkpoint(path, ORIGINAL)
    with pytest.raises(ValueError, match=r"unit lm_head: .*is not known \(there is no .*shapes="):
        published.Checkpoint(path, pattern_dict=patterns)
    assert_is_original(published.Checkpoint(path, ORIGINAL, patterns))
    shapes = {name: array.shape for name, array in original().items()}
    assert_is_original(published.Checkpoint(str(path), shapes, patterns))


def test_spread_over_files(tmp_path):
    tensors = load(SINGLE / "model.safetensors")
    shutil.copy(SHARDED / "config.json", tmp_path)
    for i in range(3):
        # Some of these are at odd offsets.
        part = dict(list(tensors.items())[i::3])
        save(tmp_path / f"model-{i}.safetensors", part)
    assert_is_original(published.Checkpoint(tmp_path))


def test_misaligned_tensors(tmp_path):
    shutil.copytree(SHARDED, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "model_layers_0.safetensors", lambda t: t.update(a=np.zeros(3, np.uint8)))
    file = tmp_path / "model_layers_0.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    # The format does not ask for the blanks that writers put there.
    header = data[8 : 8 + length].rstrip() + b" "
    while len(header) % 2 == 0:
        header += b" "
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    checkpoint = published.Checkpoint(tmp_path)
    tensors = original()
    for name in (f"{LAYER}.input_layernorm.weight", f"{LAYER}.mlp.up_proj.weight"):
        array = checkpoint.read(name)
        assert array.flags.aligned
        assert_same_bits(array, tensors[name])


def test_index(tmp_path):
    path = shutil.copytree(SHARDED, tmp_path / "model")
    index = path / "model.safetensors.index.json"
    # As DFloat11 writes it: without the units.
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert_is_original(published.Checkpoint(path))
    for weight_map, message in (
        ({"model.norm.weight": "model-2.safetensors"}, r"model-2\.safetensors: model\.norm"),
        ({"model.lost": "model.safetensors"}, r"model\.safetensors: model\.lost: .* it is not"),
        ({"model.norm.weight": "../model.safetensors"}, "expected a weight_map"),
        ({"model.norm.weight": 3}, "expected a weight_map"),
        ([], "expected a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            published.Checkpoint(path)


def test_raw_tensors_are_read_only_views():
    norm = published.Checkpoint(SHARDED).read("model.norm.weight")
    assert not norm.flags.writeable
    assert bits(norm).size == 64
