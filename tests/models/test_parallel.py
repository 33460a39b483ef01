"""Text models on several devices, which are parts of one CPU here."""

import dataclasses
import functools
import math
import re

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from mostly_slow import mostly_slow
from payloads import count_decodes
from runs import BF16, DRAWN, F32, PROMPTS, assert_same_bits, begin, read, run

import df11_jax
from df11_jax import _take, checkpoints, models
from df11_jax._product import MOST_FUSED_ROWS
from df11_jax.models import (
    _collectives,
    _devices,
    _experts,
    _layers,
    _sharding,
    _transformer,
    tables,
)

# Others have two key-value heads; and shards of a smaller one would be too small to be compressed.
WIDE = families.CONFIGS["llama-biases"] | {"hidden_size": 256, "intermediate_size": 512}
CONFIGS = families.CONFIGS | {
    "wide": WIDE,
    # Fewer key-value heads than devices.
    "shared": WIDE | {"num_key_value_heads": 2},
}
# What is divided in the others is divided in these, too.
SIZES = [("gemma4_text", 2), ("qwen2_moe", 2), ("qwen3_5_text", 2), ("shared", 4)]

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


@functools.cache
def load(family, devices, compress=True):
    """Parameters and configuration of a tiny model."""
    config = models.read_config(CONFIGS[family])
    source = models.RandomSource(config)
    return models.load_params(source, config, compress=compress, devices=devices), config


# What is computed.


# A single token needs no program of the token loop.
@pytest.mark.parametrize(("devices", "count"), mostly_slow([(2, 1), (2, 2)]))
def test_whatever_mesh_the_caller_has_set(devices, count):
    config = models.read_config(families.CONFIGS["llama"])
    source, rows = families.NoisySource(config), [[1, 2, 3], [4]]
    expected = models.load_params(source, config, devices=devices)
    tokens = models.generate(expected, rows, config, tokens=count)
    with jax.set_mesh(jax.make_mesh((4,), ("x",))):
        params = models.load_params(source, config, devices=devices)
        assert_same_bits(params, expected)
        assert models.generate(params, rows, config, tokens=count) == tokens
    # Kernels that do not compress are decompressed by a program, which would be on that mesh.
    for leaf, like in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert leaf.sharding == like.sharding


@pytest.mark.slow
def test_programs_are_where_parameters_are_whatever_mesh_is_set():
    for devices in (1, 2):
        params, config = load("llama-biases", devices)
        with jax.set_mesh(jax.make_mesh((4,), ("x",))):
            programs = models.compile_programs(params, config, batch=2, prompt=3, tokens=2)
        for program in (programs.prefill, programs.decode):
            places = jax.tree.leaves(program.input_shardings)
            assert {len(place.device_set) for place in places} == {devices}


@pytest.mark.slow
def test_drawn_tokens_are_the_same_bits():
    (compressed, config), (plain, _) = (load("llama", 2, compress=c) for c in (True, False))
    results = [run(params, config, 1, DRAWN) for params in (compressed, plain)]
    assert_same_bits(*results)


@pytest.mark.slow
@pytest.mark.fusion_emitters
@pytest.mark.parametrize(("family", "devices"), SIZES)
def test_several_devices_compute_what_one_does(family, devices):
    (alone, config), (divided, _) = load(family, 1), load(family, devices)
    config = dataclasses.replace(config, dtype=F32)
    one, (several, tokens) = read(alone, config), run(divided, config)
    # From plain weights, the same bits.
    blocks = df11_jax.size_report(divided["layers"])
    assert sum(leaf.compressed for leaf in blocks.leaves) >= 3
    plain, _ = load(family, devices, compress=False)
    assert_same_bits((several, tokens), run(plain, config))
    assert several.cache._fields == one.cache._fields
    np.testing.assert_allclose(several.logits, one.logits, atol=1e-4, rtol=1e-4)
    for actual, expected in zip(*map(jax.tree.leaves, (several.cache, one.cache)), strict=True):
        if actual.dtype == np.uint32:  # bits of keys and values, and of inputs of convolutions
            actual, expected = actual.view(np.float32), expected.view(np.float32)
            if actual.ndim == 5:
                expected = np.repeat(expected, actual.shape[2] // expected.shape[2], axis=2)
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_products_of_shards_that_stay_compressed(monkeypatch):
    """As where the CUDA library is: on a CPU, `dot` then decompresses each shard of a matrix."""
    params, config = load("qwen2_moe", 2)
    expected = run(params, dataclasses.replace(config, exact=True), batch=1)
    types = []

    def dot(x, matrices, **options):
        types.append(options["preferred_element_type"])
        return df11_jax.dot(x, matrices, **options)

    for module in (_transformer, _experts, tables):
        monkeypatch.setattr(module, "can_fuse", lambda stack, rows: rows <= MOST_FUSED_ROWS)
    monkeypatch.setattr(_layers, "dot", dot)
    jax.clear_caches()
    assert_same_bits(run(params, config, batch=1), expected)
    jax.clear_caches()
    # Those of inputs that are divided are added before they are rounded.
    assert {None, jnp.float32} == set(types)


@pytest.mark.slow
def test_bfloat16_is_rounded_once():
    # Sums of float32 products: no further from the float32 model than one device is.
    (alone, config), (divided, _) = load("llama", 1), load("llama", 2)
    exact = run(alone, dataclasses.replace(config, dtype=F32))[0].logits
    errors = [
        np.sqrt(np.mean(np.square(run(params, config)[0].logits - exact)))
        for params in (alone, divided)
    ]
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.slow
def test_all_devices_have_the_same_state():
    params, config = load("wide", 4)
    _, (state, tokens) = run(params, config, sampling=DRAWN)
    cache = state.cache.full
    for array in (*state[:-1], cache.positions, tokens):
        first, *others = (np.asarray(shard.data) for shard in array.addressable_shards)
        assert len(others) == 3 and first.shape == array.shape
        for other in others:
            assert_same_bits(other, first)
    for array in (cache.keys, cache.values):
        heads = [shard.index[2].start for shard in array.addressable_shards]
        assert heads == [0, 1, 2, 3] and array.shape[2] == 4


@pytest.mark.slow
def test_texts_are_those_of_the_tokens(tmp_path):
    model = models.load(families.write_family(tmp_path / "m", "qwen2"), devices=2)
    (completion,) = model.generate(["It is raining."], tokens=10)
    ids = model.tokenizer.encode("It is raining.").ids
    tokens = models.generate(model.params, [ids], model.config, tokens=10, stop=model.stop)
    assert [completion.tokens] == tokens


@pytest.mark.slow
def test_prompts_of_any_lengths_and_stop_tokens():
    params, config = load("llama-biases", 2)
    config = dataclasses.replace(config, dtype=F32)
    free = models.generate(params, PROMPTS, config, tokens=9)
    assert all(len(row) == 9 for row in free)
    alone = [models.generate(params, [prompt], config, tokens=9)[0] for prompt in PROMPTS]
    assert free == alone
    stop = free[0][3]
    stopped = models.generate(params, PROMPTS, config, tokens=9, stop=[stop], every=4)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_devices_that_share_a_head_have_it_all():
    params, config = load("shared", 4, compress=False)
    key = np.asarray(params["layers"]["self_attn"]["k_proj"]["kernel"])
    key = key.reshape(4, config.layers, 256, 64)
    source = models.RandomSource(config)
    for layer in range(config.layers):
        weight = source.read(f"model.layers.{layer}.self_attn.k_proj.weight")
        for device in range(4):
            head = weight[device // 2 * 64 :][:64]
            assert_same_bits(key[device, layer], np.ascontiguousarray(head.T))
    memory = [models.estimate_memory(config, batch=2, context=64, devices=n) for n in (2, 4)]
    assert memory[0].cache == memory[1].cache
    with pytest.raises(ValueError, match=r"3 key-value heads cannot .* 4 devices: expected 1$"):
        sizes = {"heads": 12, "kv_heads": 3, "hidden": 8}
        _sharding.shard_config(dataclasses.replace(config, **sizes), 4)


@pytest.mark.fusion_emitters
def test_negative_zeros_and_nans_of_an_embedding_arrive():
    bits = np.random.default_rng(0).integers(0, 2**16, (2, 128, 64)).astype(np.uint16)
    bits[0, 0], bits[1, 69] = 0x8000, 0x7FC1
    table, tokens = bits.view(BF16), np.array([0, 128 + 69, 100, 200], np.int32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2])[None], ("stage", "model"))
    divided, whole = _sharding.partition_spec(("embed_tokens",)), jax.sharding.PartitionSpec()
    small = df11_jax.compress(table, stack_axes=1, along_columns=True)
    for stack in (small, jnp.asarray(table)):
        look_up = functools.partial(_collectives.look_up, divided=True)
        specs = {"in_specs": (divided, whole), "out_specs": whole, "check_vma": False}
        rows = jax.shard_map(look_up, mesh=mesh, **specs)
        assert_same_bits(jax.jit(rows)(stack, tokens), table.reshape(-1, 64)[tokens])


# What is where.


@pytest.mark.parametrize("compress", [True, False])
def test_every_device_has_its_shard_and_no_more(compress):
    params, config = load("wide", 4, compress)
    for path, leaf in jax.tree.leaves_with_path(params):
        spec = _sharding.partition_spec([key.key for key in path if hasattr(key, "key")])
        shards = 4 if spec == _sharding.partition_spec(("embed_tokens",)) else 1
        for shard in leaf.addressable_shards:
            assert shard.data.nbytes * shards == leaf.nbytes
    plain = df11_jax.decompress_params(jax.tree.map(np.asarray, params))["layers"]
    source = models.RandomSource(config)
    block = {
        name: source.read(f"model.layers.1.{name}")
        for name in ("self_attn.k_proj.weight", "self_attn.k_proj.bias", "mlp.down_proj.weight")
    }
    width = config.head_dim
    for i in range(4):
        slice_ = i * config.layers + 1
        rows, columns = slice(i * width, (i + 1) * width), slice(i * 128, (i + 1) * 128)
        key, down = plain["self_attn"]["k_proj"], plain["mlp"]["down_proj"]
        weight = block["self_attn.k_proj.weight"]
        assert_same_bits(np.asarray(key["kernel"][slice_]), np.ascontiguousarray(weight[rows].T))
        assert_same_bits(np.asarray(key["bias"][slice_]), block["self_attn.k_proj.bias"][rows])
        weight = block["mlp.down_proj.weight"]
        expected = np.ascontiguousarray(weight[:, columns].T)
        assert_same_bits(np.asarray(down["kernel"][slice_]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_tables_have_as_many_rows_on_each_device(devices):
    config = dataclasses.replace(models.read_config(families.CONFIGS["qwen2"]), hidden=240)
    sizes = {"heads": 12, "kv_heads": 12, "head_dim": 8, "vocab": 129}
    config = dataclasses.replace(config, **sizes)
    params = models.load_params(models.RandomSource(config), config, devices=devices)
    shape = devices, 64 * -(-129 // devices // 64), config.dim
    assert params["embed_tokens"].shape == shape
    rows = np.asarray(df11_jax.decompress_params(jax.tree.map(np.asarray, params))["embed_tokens"])
    rows = rows.reshape(-1, config.dim)
    expected = models.RandomSource(config).read("model.embed_tokens.weight")
    assert_same_bits(rows[: config.vocab], expected)
    assert not rows[config.vocab :].any()
    assert models.generate(params, [[config.vocab - 1]], config, tokens=2)


def test_weights_that_do_not_compress_are_plain_on_each_device():
    config = models.read_config(families.CONFIGS["llama"])
    source = families.NoisySource(config)
    loaded = [models.load_params(source, config, devices=2, compress=c) for c in (1, 0)]
    up, expected = (params["layers"]["mlp"]["up_proj"]["kernel"] for params in loaded)
    assert_same_bits(up, expected)
    assert up.sharding == expected.sharding


@pytest.mark.slow
def test_a_single_device_of_choice():
    device = jax.devices()[2]
    params, config = load("qwen2", (device,))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))
    assert models.find_mesh(params) is None
    tokens = models.generate(params, [[1, 2]], config, tokens=5)
    assert tokens == models.generate(load("qwen2", 1)[0], [[1, 2]], config, tokens=5)


@pytest.mark.slow
def test_divided_parameters_are_saved_and_placed_again(tmp_path):
    params, config = load("llama-biases", 2)
    checkpoints.save(params, tmp_path / "divided")
    loaded = checkpoints.load(tmp_path / "divided")
    with pytest.raises(ValueError, match=r"divided for 2 devices, but on 1: see .*place_params"):
        models.generate(loaded, [[1]], config, tokens=2)
    again = models.place_params(loaded, config, jax.devices()[2:])
    assert_same_bits(again, params)
    assert models.find_mesh(again).device_ids.tolist() == [[2, 3]]
    assert models.generate(again, PROMPTS, config, tokens=4) == models.generate(
        params, PROMPTS, config, tokens=4
    )
    with pytest.raises(ValueError, match=r"embed_tokens.* has 2 slices, expected 1 for 1 device"):
        models.place_params(loaded, config, 1)


# Memory and programs.

LARGE = {
    "model_type": "gemma3_text",
    "vocab_size": 40_000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


def compile_large(devices):
    """The token loop, and the memory that weights and programs take, for so many devices."""
    config = models.read_config(LARGE)
    params = shapes.param_shapes(config, compress=True, devices=jax.devices()[:devices])
    programs = models.compile_programs(params, config, batch=2, prompt=10, tokens=500)
    return programs.decode, models.measure_memory(params, programs)


@pytest.mark.slow
def test_memory_of_each_device_is_that_of_its_shard():
    config, devices = models.read_config(LARGE), 4
    _, one = compile_large(1)
    decode, each = compile_large(devices)
    for name in ("weights", "plain_weights", "cache"):
        whole, part = getattr(one, name), getattr(each, name)
        assert whole <= devices * part <= 1.03 * whole
    # Decompressed: a block's shard, or a piece of the head, which is of the same size on all.
    piece = _take.PIECE_BYTES + 4 * 2 * 2 * config.vocab
    assert each.decode <= max(1.1 * shapes.block_nbytes(config) / devices, piece)
    # What comes from other devices are activations, and never weights.
    text = decode.as_text()
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)\(", text)
    assert {what for _, _, what in moved} == {"all-reduce", "all-gather"}
    assert {(dtype, size) for dtype, size, what in moved if what == "all-gather"} == {
        ("f32", f"2,{math.prod(_sharding.table_shape(config, devices)[:2])}")
    }
    assert {size for _, size, what in moved if what == "all-reduce"} == {f"2,1,{config.dim}"}


@pytest.mark.slow
def test_programs_are_found_compiled():
    params, config = load("llama", 2)
    options = {"batch": 1, "prompt": 3, "tokens": 130}
    models.compile_programs(params, config, **options)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled, compile_ = [], jax._src.compiler.backend_compile_and_load

        def recording(backend, module, *args, **kwargs):
            compiled.append(str(module.operation.attributes["sym_name"]))
            return compile_(backend, module, *args, **kwargs)

        patch.setattr(jax._src.compiler, "backend_compile_and_load", recording)
        models.generate(params, [[1, 2, 3]], config, tokens=130)
        # What other tests may have compiled, such as the seed's key, is none of them.
        assert not [name for name in compiled if "prefill" in name or "decode" in name]
        models.generate(params, [[1, 2, 3]], config, tokens=400)
        assert [name for name in compiled if "decode" in name], "another length is another program"


@pytest.mark.slow
def test_each_device_decodes_its_slices_once_a_token():
    params, config = load("llama", 2)
    leaves = df11_jax.size_report(params["layers"]).leaves
    bands = math.prod(params["lm_head"].shape[:2]) // 64
    blocks = 2 * config.layers * sum(leaf.compressed for leaf in leaves)
    assert count_decodes(begin(params, config)) == 5 * (2 + blocks + bands)


# Errors.


@pytest.mark.parametrize(
    ("family", "devices", "message"),
    [
        (
            "llama-biases",
            3,
            "4 query heads and 4 key-value heads and 160 hidden units cannot be divided among 3 "
            "devices: expected 1 or 2 or 4",
        ),
        ("qwen3_5_text", 4, "2 key heads of linear layers cannot .* among 4 .*: expected 1 or 2$"),
        ("llama", 0, "devices is 0, expected 1 to 4, which is how many there are"),
        ("llama", -1, "devices is -1, expected 1 to 4, which is how many there are"),
        ("llama", 99, "devices is 99, expected 1 to 4, which is how many there are"),
        ("llama", [], "expected one device or several different ones"),
        ("llama", "same", "expected one device or several different ones"),
    ],
)
def test_what_cannot_be_divided(family, devices, message):
    config = models.read_config(families.CONFIGS[family])
    devices = jax.devices()[:1] * 2 if devices == "same" else devices
    with pytest.raises(ValueError, match=message):
        models.load_params(families.source_of(family), config, devices=devices)


def test_layers_in_host_memory_are_for_one_device():
    params, config = load("llama", 2, compress=False)
    params = params | {"host_layers": params["layers"]}
    with pytest.raises(ValueError, match="host_layers, but are divided over 2 devices"):
        models.generate(params, [[1]], config, tokens=2)


def test_places_of_leaves():
    config = models.read_config(families.CONFIGS["llama"])
    alone, some = (_devices.ParamDevices(config, devices) for devices in (None, 2))
    assert alone.of(("norm",)) is None and alone.count == 1
    assert some.of(("norm",)).is_fully_replicated
    assert not some.of(("lm_head",)).is_fully_replicated
