"""Text models over the devices of several processes, which are parts of one CPU here."""

import collections
import json
import zlib

import families
import jax
import numpy as np
import pytest
from processes import find_port, finish, start_python
from runs import DRAWN, run

from df11_jax import checkpoints, models

pytestmark = pytest.mark.slow

WIDE = families.CONFIGS["llama-biases"] | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# Devices share key-value heads; a stack for each type of layers, experts, parameters in float32.
MIXED = families.CONFIGS["qwen3_5_moe_text"] | {
    "num_hidden_layers": 2,
    "linear_num_key_heads": 4,
}

START = """
import sys
import jax

port, count, process, timeout, path = *map(int, sys.argv[1:5]), sys.argv[5]
jax.distributed.initialize(
    f"localhost:{port}", count, process,
    heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=timeout)
from df11_jax import checkpoints, models
import test_processes
"""


def start(program, path, count, devices, timeout=600):
    port, each = find_port(), [devices] * count if isinstance(devices, int) else devices
    return [
        start_python(START + program, port, count, i, timeout, path, devices=each[i])
        for i in range(count)
    ]


def describe(params):
    """The bytes that are here, and a digest of each shard."""
    nbytes, digests = 0, {}
    for path, leaf in jax.tree.leaves_with_path(params):
        for shard in leaf.addressable_shards:
            nbytes += shard.data.nbytes
            digests[f"{jax.tree_util.keystr(path)} {shard.index}"] = zlib.crc32(
                np.ascontiguousarray(shard.data).view(np.uint8)
            )
    return {"nbytes": nbytes, "digests": digests}


def compute(params, config):
    """Tokens and logits."""
    state, tokens = run(params, config, sampling=DRAWN)[1]
    return {"tokens": np.asarray(tokens).tolist(), "logits": np.asarray(state.logits).tolist()}


def load_all(path):
    """A model that is drawn, and one that was saved as it was divided."""
    config = models.read_config(MIXED)
    drawn = models.load_params(families.NoisySource(config), config, devices=4)
    return drawn, models.load(path + "/saved", devices=4).params


def load_and_compute(path):
    """What there is in each process to compare."""
    drawn, saved = load_all(path)
    return describe(drawn), describe(saved), compute(drawn, models.read_config(MIXED))


class CountingSource(families.NoisySource):
    """One that says what was read of it."""

    def __init__(self, config):
        super().__init__(config)
        self.names = []

    def read(self, name):
        self.names.append(name)
        return super().read(name)


def load_stages(path):
    """What there is here of a model in two stages, what it computes, and what was read for it.

    It is saved by these processes, and loaded without stages. What computes was saved by one.
    """
    import orbax_helpers  # here, as it takes the processes of other tests seconds

    config = models.read_config(WIDE)
    source = CountingSource(config)
    params = models.load_params(source, config, devices=4, stages=2)
    here = f"{path}/stages-{jax.process_count()}"
    orbax_helpers.save(here, params)
    was = "4 devices in 2 stages"
    with pytest.warns(match=f"^4 of 8 compressed leaves .* saved for {was}, .* for 4 devices now"):
        flat = models.load_params(checkpoints.open_checkpoint(here), config, devices=4)
    saved = checkpoints.open_checkpoint(path + "/stages-1")
    again = models.load_params(saved, config, devices=4, stages=2)
    described = [describe(tree) for tree in (params, again, flat)]
    return described, compute(again, config), source.names


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with models, and what a single process computes with them."""
    path, source = tmp_path_factory.mktemp("models"), models.RandomSource(models.read_config(WIDE))
    tensors = {name: source.read(name) for name in source.tensors}
    families.write_directory(path / "plain", WIDE, tensors)
    families.write_directory(path / "saved", WIDE, {})
    (path / "saved" / "model.safetensors").unlink()
    checkpoints.save(models.load(path / "plain", devices=4).params, path / "params")
    for file in (path / "params").iterdir():
        file.rename(path / "saved" / file.name)
    return path, load_and_compute(str(path))


def collect(one, count, devices, statement):
    """The value of a statement in each of several processes."""
    program = f"""
import json
import pathlib

pathlib.Path(path, f"{{process}}.json").write_text(json.dumps({statement}))
"""
    finish(start(program, one[0], count, devices))
    return [json.loads((one[0] / f"{i}.json").read_text()) for i in range(count)]


def assert_same_shards(parts, whole):
    """Each process has its part, and the parts have the bits of the whole."""
    assert any("sign_mantissa" in name for name in whole["digests"])
    for part in parts:
        assert part["nbytes"] * len(parts) == whole["nbytes"]
    assert_same_digests(parts, whole)


def assert_same_digests(parts, whole):
    assert collections.ChainMap(*(part["digests"] for part in parts)) == whole["digests"]


def test_two_processes_compute_what_one_does(one):
    results = collect(one, 2, 2, "test_processes.load_and_compute(path)")
    *parts, computed = zip(*results, strict=True)
    *wholes, expected = one[1]
    for part, whole in zip(parts, wholes, strict=True):
        assert_same_shards(part, whole)
    for here in computed:
        assert here["tokens"] == expected["tokens"]
        assert here["logits"] == computed[0]["logits"]
        np.testing.assert_allclose(here["logits"], expected["logits"], atol=1e-5)


def test_four_processes_load_what_one_does(one):
    statement = "[*map(test_processes.describe, test_processes.load_all(path))]"
    for parts, whole in zip(zip(*collect(one, 4, 1, statement), strict=True), one[1], strict=False):
        assert_same_shards(parts, whole)


def test_processes_that_have_one_device_and_three(one):
    statement = "[*map(test_processes.describe, test_processes.load_all(path))]"
    results = collect(one, 2, (1, 3), statement)
    for parts, whole in zip(zip(*results, strict=True), one[1], strict=False):
        assert_same_digests(parts, whole)


def test_stages_of_processes(one):
    wholes, expected, names = load_stages(str(one[0]))
    # Of each stage two processes have a device.
    results = collect(one, 4, 1, "test_processes.load_stages(path)")
    parts, computed, read = zip(*results, strict=True)
    for part, whole in zip(zip(*parts, strict=True), wholes, strict=True):
        assert_same_shards(part, whole)
    for i, here in enumerate(computed):
        assert here["tokens"] == expected["tokens"]
        np.testing.assert_allclose(here["logits"], expected["logits"], atol=1e-5)
        # Nobody reads the other stage's layer.
        other = f"layers.{1 - i // 2}."
        assert read[i] == [name for name in names if other not in name]
    config = models.read_config(WIDE)
    saved = checkpoints.open_checkpoint(one[0] / "stages-4")
    assert describe(models.load_params(saved, config, devices=4, stages=2)) == wholes[0]
    assert wholes[0] == wholes[1]
    flat = models.load_params(families.NoisySource(config), config, devices=4)
    assert describe(flat)["digests"] == wholes[2]["digests"]


def test_what_processes_have_to_agree_on(one):
    program = """
config = models.read_config(test_processes.WIDE)
source = models.RandomSource(config)
here, everywhere = jax.local_devices(), jax.devices()
other = [device for device in everywhere if device not in here]
for options in ({"compress": process == 0}, {"devices": 2}, {"devices": other}):
    try:
        models.load_params(source, config, **options)
    except ValueError as error:
        print(error)
divided = models.load(path + "/saved")
placed = models.place_params(checkpoints.load(path + "/saved"), divided.config, everywhere)
assert test_processes.describe(placed) == test_processes.describe(divided.params)
alone = models.load_params(source, config, devices=here)
assert models.find_mesh(alone).size == 2
assert models.generate(alone, [[1, 2]], config, tokens=2)
"""
    for i, output in enumerate(finish(start(program, one[0], 2, 2))):
        assert "processes [1] load another model, or with other arguments" in output
        assert "devices is 2, expected 4, which is how many the 2 processes have" in output
        assert f"devices are those of processes [{1 - i}], expected devices of all 2" in output


@pytest.mark.parametrize(
    ("dying", "end"),
    [
        (0, "os.kill(os.getpid(), signal.SIGKILL)"),
        (1, "raise ValueError('damaged')"),
    ],
)
def test_a_process_that_dies_ends_the_others(one, dying, end):
    program = f"""
import os, signal

def die(rows):
    if process == {dying}:
        {end}

model = models.load(path + "/plain")
model.generate(["It is"], tokens=400, callback=die)
print("complete")
"""
    processes = start(program, one[0], 2, 2, timeout=10)
    outputs = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode for process in processes)
    output, error = outputs[1 - dying]
    assert "complete" not in output and "another task died" in error
