"""Parameters that were saved, loaded onto other devices than they were divided for."""

import contextlib
import functools
import shutil

import families
import jax
import numpy as np
import orbax_helpers
import pytest
from click.testing import CliRunner
from runs import assert_same_bits

from df11_jax import checkpoints, models
from df11_jax._array import is_df11
from df11_jax._stack import fit_exponents
from df11_jax.cli import _commands
from df11_jax.models import fit

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")

WIDE = families.CONFIGS["llama-biases"] | {"hidden_size": 256, "intermediate_size": 512}
CONFIGS = families.CONFIGS | {
    # Some devices share a key-value head; in stages, two layers each.
    "shared": WIDE | {"num_key_value_heads": 2, "num_hidden_layers": 2},
    "hybrid": families.CONFIGS["qwen3_5_moe_text"]
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "large table": families.CONFIGS["qwen2"] | {"vocab_size": 600},
}


@functools.cache
def config_and_source(name):
    config = models.read_config(CONFIGS[name])
    return config, families.NoisySource(config)


@functools.cache
def load(name, devices, stages=1):
    config, source = config_and_source(name)
    return models.load_params(source, config, devices=devices, stages=stages)


def save_orbax(params, path):
    orbax_helpers.save(path, params)


def leaves_of(params):
    return jax.tree.leaves(params, is_leaf=is_df11)


def with_room(params, like=None):
    """The same with longer arrays of exponents, or with arrays like those of others."""

    def fit(leaf, other):
        if not is_df11(leaf):
            return leaf
        words = other.exponents.shape[-1]
        return fit_exponents(leaf, words if like else words + 4)

    return jax.tree.map(fit, params, like or params, is_leaf=is_df11)


# In the last column, how many leaves are compressed again.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "save", "after", "again"),
    [
        ("shared", (1, 1), checkpoints.save, (4, 1), 7),
        ("shared", (4, 1), save_orbax, (1, 1), 7),
        ("shared", (2, 1), checkpoints.save, (4, 1), 5),  # not keys and values, which are shared
        ("shared", (4, 1), checkpoints.save, (2, 1), 5),
        ("shared", (4, 1), checkpoints.save, (4, 1), 0),
        ("shared", (4, 2), checkpoints.save, (4, 2), 0),
        ("shared", (4, 1), save_orbax, (4, 2), 4),  # neither keys and values nor the embedding
        ("shared", (4, 2), checkpoints.save, (2, 1), 1),  # the embedding
        ("shared", (2, 1), save_orbax, (4, 2), 1),
        ("shared", (1, 1), checkpoints.save, (2, 2), 1),
        ("large table", (4, 1), save_orbax, (1, 1), 3),
        ("large table", (1, 1), checkpoints.save, (4, 1), 3),
        ("hybrid", (1, 1), checkpoints.save, (2, 1), 11),
        ("hybrid", (4, 2), save_orbax, (2, 2), 11),
        ("gemma4_text", (2, 1), checkpoints.save, (1, 1), 12),
    ],
)
def test_other_devices(name, before, save, after, again, tmp_path):
    # More room marks those that stay as they were stored.
    save(with_room(load(name, *before)), tmp_path / "saved")
    config, expected = config_and_source(name)[0], load(name, *after)
    source = checkpoints.open_checkpoint(tmp_path / "saved")
    said = pytest.warns(match=f"^{again} of") if again else contextlib.nullcontext()
    with said:
        loaded = models.load_params(source, config, devices=after[0], stages=after[1])
    leaves = zip(leaves_of(loaded), leaves_of(expected), strict=True)
    pairs = [(leaf, fresh) for leaf, fresh in leaves if is_df11(fresh)]
    kept = [leaf.exponents.shape != fresh.exponents.shape for leaf, fresh in pairs]
    assert len(kept) - sum(kept) == again
    loaded = with_room(loaded, expected)
    assert_same_bits(loaded, expected)
    for leaf, fresh in zip(*map(jax.tree.leaves, (loaded, expected)), strict=True):
        assert leaf.sharding.is_equivalent_to(fresh.sharding, leaf.ndim)


def test_other_forms(tmp_path):
    """Decompressed, and then compressed leaf by leaf: divided anew without a warning."""
    config, source = config_and_source("shared")
    plain = models.load_params(source, config, devices=2, compress=False)
    checkpoints.save(load("shared", 2), tmp_path / "saved")
    for command, before, after in (("de", "saved", "plain"), ("", "plain", "by leaf")):
        arguments = [f"{command}compress", str(tmp_path / before), str(tmp_path / after)]
        result = CliRunner().invoke(_commands.commands, arguments)
        assert result.exit_code == 0, result.output
        saved = checkpoints.open_checkpoint(tmp_path / after)
        assert_same_bits(models.load_params(saved, config, devices=4), load("shared", 4))
        assert_same_bits(models.load_params(saved, config, devices=2, compress=False), plain)


def flip_a_bit(folder, data):
    """Changes one bit of what is stored as `data`."""
    middle = data[len(data) // 2 :][:64]
    files = [file for file in folder.rglob("*") if file.is_file()]
    ((file, content),) = [(f, c) for f in files if middle in (c := bytearray(f.read_bytes()))]
    content[content.index(middle)] ^= 16
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("save", [checkpoints.save, save_orbax])
def test_damage_is_found(save, tmp_path):
    """In leaves that stay as they are, whose slices are taken, and that are compressed again."""
    config, params = config_and_source("shared")[0], load("shared", 2)
    attention = params["layers"]["self_attn"]
    for name, leaf, devices in (
        ("k_proj", attention["k_proj"]["kernel"], 2),
        ("k_proj", attention["k_proj"]["kernel"], 4),
        ("o_proj", attention["o_proj"]["kernel"], 4),
    ):
        path = tmp_path / f"{name} {devices}"
        save(params, path)
        flip_a_bit(path, np.asarray(leaf.sign_mantissa).tobytes())
        source = checkpoints.open_checkpoint(path)
        said = pytest.warns(match="5 of") if devices == 4 else contextlib.nullcontext()
        with said, pytest.raises(ValueError, match=f"{name}/kernel.* corrupt|damaged.*{name}"):
            models.load_params(source, config, devices=devices)


def test_directories_of_orbax_checkpoints(tmp_path):
    directory = families.write_family(tmp_path / "model", "qwen2")
    model = models.load(directory, devices=2)
    save_orbax(model.params, tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match=r"config\.json: is missing"):
        models.load(tmp_path / "saved")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(directory / name, tmp_path / "saved")
    loaded = models.load(tmp_path / "saved", devices=2)
    assert (loaded.config, loaded.stop) == (model.config, model.stop)
    assert_same_bits(loaded.params, model.params)
    found = fit.read_model(tmp_path / "saved")
    assert found.config == model.config and found.parameters == fit.read_model(directory).parameters
