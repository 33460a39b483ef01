# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "df11_jax", "levanter==1.2.dev1644", "haliax==1.4.dev453", "equinox==0.13.8", "jax==0.9.2",
#   "jaxlib==0.9.2", "chex", "GitPython",
# ]
# ///
"""levanter: its Llama, whose fold over layers is replaced by scan_blocks."""

import warnings

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax.nn.scan import Stacked

import df11_jax

warnings.simplefilter("ignore")  # of the many packages that levanter imports
from levanter.layers.attention import AttentionMask
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel

CONFIG = LlamaConfig(
    seq_len=32,
    hidden_dim=128,
    intermediate_dim=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)
VOCAB = hax.Axis("vocab", 256)


def is_named(leaf):
    """Whether this is an array with names: inside of it may be a compressed one."""
    return isinstance(leaf, hax.NamedArray)


def fold(layers, carry, *args, unroll=None, **kwargs):
    """`Stacked.fold`, one layer decompressed after the other."""
    named, treedef = jax.tree.flatten(layers.stacked, is_leaf=is_named)

    def step(carry, arrays, _):
        layer = [
            hax.named(array, hax.axis.without_axes(leaf.axes, layers.Block))
            for leaf, array in zip(named, arrays, strict=True)
        ]
        return jax.tree.unflatten(treedef, layer)(carry, *args, **kwargs), None

    return df11_jax.scan_blocks(step, carry, [leaf.array for leaf in named])[0]


def main():
    """Logits with plain parameters and their fold, and with compressed ones and this one."""
    model = LlamaLMHeadModel.init(VOCAB, CONFIG, key=jax.random.key(0))
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    small = df11_jax.compress_params(model, stacked="layers/stacked/")
    report = df11_jax.size_report(small)
    print(f"{report.nbytes_before:,} bytes, compressed {report.nbytes:,}")
    assert report.nbytes < 0.7 * report.nbytes_before
    tokens = hax.named(jnp.arange(24).reshape(2, 12), ("batch", "position"))

    def logits_of(model):
        run = eqx.filter_jit(lambda model: model(tokens, attn_mask=AttentionMask.causal()).array)
        return np.asarray(run(model)).view(np.uint16)

    expected = logits_of(model)
    Stacked.fold = fold
    np.testing.assert_array_equal(logits_of(model), expected)
    np.testing.assert_array_equal(logits_of(small), expected)
    print("the same logits")


if __name__ == "__main__":
    main()
