# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "df11_jax[orbax]", "maxtext==0.2.5", "flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8",
#   "orbax-checkpoint==0.12.8", "qwix==0.1.8",
#   # What it imports: the wheel itself names requirements only with accelerators.
#   "aqtp", "chex", "cloud-accelerator-diagnostics", "datasets", "drjax",
#   "google-cloud-mldiagnostics", "grain", "jinja2", "jsonlines", "ml-collections",
#   "ml-goodput-measurement", "omegaconf", "pathwaysutils", "pillow", "pydantic", "sentencepiece",
#   "sympy", "tensorboardx", "tensorflow", "tensorflow-datasets", "tensorflow-text", "tiktoken",
#   "tokamax", "transformers",
# ]
# ///
"""MaxText: a checkpoint of its training, its engine and its linen model with compressed weights.

MaxText has the layers of a stack along axis 1 of each parameter, and moves axes of arrays before it
scans over them. Compressed stacks have their layers in front: `stack_axis=1` brings them there as a
checkpoint is read, and a model with `param_scan_axis=0` takes them from there.
"""

import os
import pathlib
import tempfile
import warnings

os.environ["DECOUPLE_GCLOUD"] = "TRUE"
warnings.simplefilter("ignore")  # of the many packages that MaxText imports

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from maxtext.common import checkpointing, train_state_nnx
from maxtext.configs import pyconfig
from maxtext.inference.maxengine import maxengine
from maxtext.utils import maxtext_utils, model_creation_utils

import df11_jax.nnx
from df11_jax.orbax import DF11CheckpointHandler, DF11Restore

TOKENS = jnp.arange(16, dtype=jnp.int32)[None]
# Of a train state, the optimizer's moments stay as they are.
COMPRESS = {"stacked": "^params/.*/layers/", "stack_axis": 1}


def configure(**changes):
    """MaxText's defaults, but for sizes and bfloat16 weights."""
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    return pyconfig.initialize(
        ["", str(base)],
        run_name="example",
        hardware="cpu",
        skip_jax_distributed_system=True,
        attention="dot_product",
        dtype="bfloat16",
        weight_dtype="bfloat16",
        base_emb_dim=128,
        base_mlp_dim=256,
        base_num_decoder_layers=4,
        base_num_query_heads=4,
        base_num_kv_heads=2,
        head_dim=32,
        vocab_size=256,
        max_target_length=16,
        max_prefill_predict_length=8,
        per_device_batch_size=1,
        log_config=False,
        **changes,
    )


def logits_of(model):
    run = nnx.jit(lambda model: model(TOKENS, TOKENS, jnp.ones_like(TOKENS), enable_dropout=False))
    return np.asarray(run(model))


def save_train_state(config, model, folder):
    """Saves model and optimizer as their training does."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    manager = checkpointing.create_orbax_checkpoint_manager(str(folder), True, False, 1)
    state = train_state_nnx.TrainStateNNX(model, optimizer)
    checkpointing.save_checkpoint(manager, 0, state, config, force=True)
    checkpointing.wait_until_finished(manager)
    return folder / "0" / "items"


def decode(engine, params):
    """Logits of a prompt, and the tokens that the engine writes after it."""
    prompt = jnp.arange(1, 9, dtype=jnp.int32)
    key = jax.random.key(0)
    prefix, token = engine.prefill(params=params, padded_tokens=prompt, true_length=6, rng=key)
    state = engine.insert(prefix, engine.init_decode_state(key), slot=0)
    tokens = [np.asarray(token.data)]
    for _ in range(6):
        state, token = engine.generate(params, state, rng=key)
        tokens.append(np.asarray(token.data))
    return np.asarray(prefix["logits"]), tokens


def as_pytree(tokens):
    """Makes a pytree of what MaxText has in place of JetStream's class of tokens."""
    jax.tree_util.register_pytree_node(
        tokens,
        lambda t: ((t.data, t.log_prob), None),
        lambda _, children: tokens(data=children[0], log_prob=children[1]),
    )


def from_train_state(config, front, mesh):
    """A forward pass with the parameters of a train state, compressed as they are read."""
    model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
    expected = logits_of(model)
    with tempfile.TemporaryDirectory() as folder:
        items = save_train_state(config, model, pathlib.Path(folder) / "checkpoints")
        with ocp.Checkpointer(DF11CheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(items, args=DF11Restore(compress=COMPRESS))
    moments = jax.tree.leaves(restored["opt_state"], is_leaf=is_compressed)
    assert moments and not any(map(is_compressed, moments))
    report = df11_jax.size_report(restored["params"])
    print(f"parameters: {report.nbytes_before:,} bytes, compressed {report.nbytes:,}")
    assert report.nbytes < 0.7 * report.nbytes_before

    model = model_creation_utils.from_config(front, mesh=mesh, rngs=nnx.Rngs(1))
    assert logits_of(model).tobytes() != expected.tobytes()
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, restored["params"]["params"])
    nnx.update(model, state)
    df11_jax.nnx.compress(model)
    assert logits_of(model).tobytes() == expected.tobytes()
    print("a train state, restored compressed: the same logits")


def in_engine(front):
    """Prefill and decoding by MaxEngine."""
    as_pytree(maxengine.engine_api.ResultTokens)
    engine = maxengine.MaxEngine(front)
    model = model_creation_utils.from_config(front, mesh=engine.mesh, rngs=nnx.Rngs(0))
    params = engine.load_params(params=nnx.state(model, nnx.Param), rng=jax.random.key(0))
    expected, expected_tokens = decode(engine, params)
    df11_jax.nnx.compress(params, stacked="layers/")
    logits, tokens = decode(engine, params)
    assert logits.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(tokens, expected_tokens)
    print("MaxEngine: the same logits and tokens")


def in_linen(config, front, mesh):
    """Its linen model, whose parameters are in boxes."""
    model, small_model = (model_creation_utils.from_config(c, mesh=mesh) for c in (config, front))
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "aqt")}
    arguments = (TOKENS, TOKENS, jnp.ones_like(TOKENS))
    variables = model.init(keys, *arguments, enable_dropout=False)
    small = df11_jax.compress_params(variables, **COMPRESS)
    assert is_compressed(small["params"]["token_embedder"]["embedding"])

    def apply(model, variables):
        run = jax.jit(lambda v: model.apply(v, *arguments, enable_dropout=False, rngs=keys))
        return np.asarray(run(variables)).tobytes()

    assert apply(small_model, small) == apply(model, variables)
    print("linen, parameters in boxes: the same logits")


def is_compressed(leaf):
    """Whether a leaf is compressed, for tree functions that are not to look inside."""
    return isinstance(leaf, df11_jax.DF11Array)


def main():
    """A train state, MaxText's engine, and its linen model."""
    config, front = configure(), configure(param_scan_axis=0)
    mesh = maxtext_utils.get_mesh_from_config(config)
    with mesh, nn.logical_axis_rules(config.logical_axis_rules):
        from_train_state(config, front, mesh)
        in_engine(front)
        in_linen(config, front, mesh)


if __name__ == "__main__":
    main()
