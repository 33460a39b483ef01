"""Mixtures of experts: who maps which token, what is decompressed for it, and where it lies."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from mostly_slow import mostly_slow
from payloads import assert_same_bits, count_decodes, random_weights
from safetensors.numpy import load_file

import df11_jax
from df11_jax import checkpoints, models
from df11_jax._array import is_df11
from df11_jax.models import _experts

LAYERS, COUNT, PER_TOKEN, DIM, HIDDEN = 2, 8, 3, 32, 24
CONFIG = dataclasses.replace(
    models.read_config(families.CONFIGS["qwen3_moe"]),
    dim=DIM,
    hidden=HIDDEN,
    experts=models.Experts(COUNT, PER_TOKEN, normed=True),
    dtype=jnp.float32,
)


@pytest.fixture(scope="module")
def plain():
    """Experts of two layers, those of the first of which are never to be used."""
    shapes = {"gate_proj": (DIM, HIDDEN), "up_proj": (DIM, HIDDEN), "down_proj": (HIDDEN, DIM)}
    return {
        name: {"kernel": random_weights((LAYERS, COUNT, *shape), i, 0.2).at[0].set(jnp.nan)}
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def compressed(plain):
    return jax.tree.map(lambda kernels: df11_jax.compress(kernels, stack_axes=2), plain)


def silu(x):
    return x / (1 + np.exp(-x))


def expected(x, logits, plain):
    """The same token by token, and the experts that they chose."""
    gate, up, down = (np.asarray(m["kernel"][1], np.float64) for m in plain.values())
    chosen = np.argsort(-logits, axis=1)[:, :PER_TOKEN]
    out = np.zeros(x.shape)
    for token, own in enumerate(chosen):
        chances = np.exp(logits[token, own])
        for expert, chance in zip(own, chances / chances.sum(), strict=True):
            hidden = silu(x[token] @ gate[expert]) * (x[token] @ up[expert])
            out[token] += chance * (hidden @ down[expert])
    return out, set(chosen.flat)


# Tokens, experts that are decompressed at a time, and rows of each at least: one token; one group
# and turn; several turns; several groups, the last one not full; both; and two of three groups.
CASES = [(1, 3, 8), (2, 6, 8), (40, 8, 8), (40, 3, 64), (40, 3, 8), (3, 3, 8)]


@pytest.mark.parametrize(("tokens", "at_once", "rows"), mostly_slow(CASES, fast=2))
def test_each_token_has_its_experts(plain, compressed, monkeypatch, tokens, at_once, rows):
    monkeypatch.setattr(_experts, "GROUP_BYTES", at_once * 2 * 3 * DIM * HIDDEN)
    monkeypatch.setattr(_experts, "_LEAST_ROWS", rows)
    draws = np.random.default_rng(tokens)
    x = draws.standard_normal((tokens, DIM)).astype(np.float32)
    logits = draws.standard_normal((tokens, COUNT)).astype(np.float32)
    logits[:, 0] = 5  # all of them choose the first one, and none the last one
    logits[:, -1] = -5
    out, chosen = expected(x, logits, plain)

    @jax.jit
    def run(matrices, x, logits):
        layer = _experts.LayerExperts(matrices, jnp.int32(1))
        return _experts.experts(x, logits, layer, CONFIG)

    actual = run(compressed, x, logits)
    np.testing.assert_allclose(actual, out, atol=1e-5)
    runs.assert_same_bits(run(plain, x, logits), actual)
    if jax.default_backend() == "cpu":
        assert count_decodes(run, compressed, x, logits) == 3 * len(chosen)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", pytest.param("qwen3_5_moe_text", marks=pytest.mark.slow)]
)
def test_a_single_token_decompresses_the_experts_that_it_chooses(family, monkeypatch):
    compressed, config = runs.load(family)
    plain, _ = runs.load(family, compress=False)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, config):
        token, cache = jnp.ones((1, 1), jnp.int32), models.init_cache(config, 1, 4)
        x, cache = models.forward(params, token, token - 1, 0, cache, config)
        return models.project(params, x, config), cache

    expected = run(plain, config)
    # As where the CUDA library is: on a CPU, `dot` then decompresses each matrix.
    monkeypatch.setattr(_experts, "can_fuse", lambda stack, rows: rows == 1)
    for exact in (True, False):
        config = dataclasses.replace(config, exact=exact)
        runs.assert_same_bits(run(compressed, config), expected)
        if jax.default_backend() == "cpu":
            experts = config.experts.per_token * 3 * config.layers
            leaves = jax.tree.leaves(compressed["layers"], is_leaf=is_df11)
            stacks = [leaf.stack_shape for leaf in leaves if is_df11(leaf)]
            others = sum(shape[0] for shape in stacks if len(shape) == 1)
            in_tables = 1 + compressed["lm_head"].shape[1] // 64
            assert count_decodes(run, compressed, config) == experts + others + in_tables


@pytest.mark.slow
def test_layers_in_host_memory_have_their_experts():
    params, config = runs.load("qwen2_moe", compress=False)
    config = dataclasses.replace(config, dtype=jnp.float32)
    first, second = (
        jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["layers"]) for i in range(2)
    )
    apart = params | {"layers": first, "host_layers": second}
    rows = families.prompts(length=5).tolist()
    for actual, whole in zip(
        runs.all_logits(apart, config, rows), runs.all_logits(params, config, rows), strict=True
    ):
        np.testing.assert_allclose(actual, whole, atol=1e-5)


# Checkpoints.

MODEL = "model.safetensors"


def fuse(tensors):
    """The tensors as transformers 5 has them, those of all experts of a layer in two."""
    renamed = {
        name.replace("block_sparse_moe", "mlp")
        .replace(".w1.", ".gate_proj.")
        .replace(".w3.", ".up_proj.")
        .replace(".w2.", ".down_proj."): tensor
        for name, tensor in tensors.items()
    }
    fused = {name: tensor for name, tensor in renamed.items() if ".experts." not in name}
    for layer in {name.split(".")[2] for name in renamed if ".experts." in name}:
        experts = f"model.layers.{layer}.mlp.experts"
        count = sum(name.startswith(experts) for name in renamed) // 3
        gate, up, down = (
            np.stack([renamed[f"{experts}.{e}.{name}_proj.weight"] for e in range(count)])
            for name in ("gate", "up", "down")
        )
        fused[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{experts}.down_proj"] = down
    return fused


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_those_that_are_tensors_each(family, tmp_path):
    directory = families.write_family(tmp_path / "each", family)
    tensors = load_file(directory / MODEL)
    fields = dict(families.CONFIGS[family])
    fields["num_local_experts"] = fields.pop("num_experts", fields.get("num_local_experts"))
    fused = models.load(families.write_directory(tmp_path / "fused", fields, fuse(tensors)))
    each = models.load(directory)
    assert fused.config == each.config
    runs.assert_same_bits(fused.params, each.params)
    kernels = each.params["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert kernels.stack_shape == (2, each.config.experts.count)
    name = {"mixtral": "block_sparse_moe.experts.1.w3"}.get(family, "mlp.experts.1.up_proj")
    expected = np.ascontiguousarray(tensors[f"model.layers.1.{name}.weight"].T)
    assert_same_bits(df11_jax.decompress(kernels)[1, 1], expected)
    wrong = fuse(tensors)
    wrong["model.layers.0.mlp.experts.down_proj"] = wrong["model.layers.0.mlp.experts.gate_up_proj"]
    with pytest.raises(
        ValueError, match=r"mlp\.experts\.down_proj: expected shape \[\d+, 64, \d+\]"
    ):
        models.load(families.write_directory(tmp_path / "wrong", fields, wrong))


def test_experts_of_multimodal_hybrids(tmp_path):
    text = families.CONFIGS["qwen3_5_moe_text"]
    fields = {"model_type": "qwen3_5_moe", "text_config": text}
    tensors = load_file(families.write_family(tmp_path / "m", text["model_type"]) / MODEL)
    alone = models.load(tmp_path / "m")
    # What guesses several tokens may have its experts in the other way.
    for own, other in ((fuse(tensors), "0.up_proj.weight"), (tensors, "gate_up_proj")):
        inner = {name.replace("model.", "model.language_model.", 1): x for name, x in own.items()}
        inner[f"mtp.layers.0.mlp.experts.{other}"] = np.zeros(2, np.float32)
        path = families.write_directory(tmp_path / other, fields, inner)
        with pytest.warns(match="left out: mtp$"):
            model = models.load(path)
        assert model.config == alone.config
        runs.assert_same_bits(model.params, alone.params)
    # The second of the linear layers is the third of all.
    kernels = alone.params["layers"]["linear"]["mlp"]["experts"]["down_proj"]["kernel"]
    expected = np.ascontiguousarray(tensors["model.layers.2.mlp.experts.4.down_proj.weight"].T)
    assert_same_bits(df11_jax.decompress(kernels)[1, 4], expected)


def test_saved_parameters_are_loaded(tmp_path):
    params, _ = runs.load("mixtral")
    checkpoints.save(params, tmp_path / "m")
    runs.assert_same_bits(checkpoints.load(tmp_path / "m"), params)
