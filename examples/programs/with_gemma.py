# /// script
# requires-python = ">=3.12"
# dependencies = [
#   "df11_jax", "gemma==4.0.1", "sentencepiece<0.2.2", "flax==0.12.12", "jax==0.12.0.1",
# ]
# ///
"""Google's gemma 4: its linen model and its sampler, as they are and decompressed by block."""

import pathlib
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

import df11_jax
from df11_jax.linen import compressed

warnings.simplefilter("ignore")  # of the many packages that gemma imports
from gemma import gm
from gemma.gm.nn.gemma4 import _config, _modules

VOCAB = 512
LOCAL, GLOBAL = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
CONFIG = _config.TransformerConfig(
    num_embed=VOCAB,
    embed_dim=128,
    hidden_dim=512,
    num_heads=4,
    head_dim=64,
    num_kv_heads=1,
    final_logit_softcap=30.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(LOCAL, LOCAL, GLOBAL),
    sliding_window_size=8,
    local_rope_proportion=1.0,
    global_rope_proportion=0.25,
)
TOKENS = jnp.arange(1, 25, dtype=jnp.int32).reshape(2, 12)


def make_tokenizer(folder):
    """Their tokenizer, with a small vocabulary made of this file."""
    prefix = str(pathlib.Path(folder) / "small")
    sentencepiece.SentencePieceTrainer.train(
        input=__file__,
        model_prefix=prefix,
        vocab_size=VOCAB,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return gm.text.Gemma4Tokenizer(path=prefix + ".model")


def compare(model, tokenizer, params, small):
    """Logits, and what their sampler writes, with plain and with compressed parameters."""
    run = jax.jit(lambda params: model.apply({"params": params}, TOKENS).logits)
    actual, expected = (np.asarray(run(p)) for p in (small, params))
    assert actual.tobytes() == expected.tobytes()

    def sample(params):
        sampler = gm.text.Sampler(
            model=model,
            params=params,
            tokenizer=tokenizer,
            sampling=gm.text.RandomSampling(),
            cache_length=64,
            max_out_length=32,
            pad_length=16,
        )
        options = {"max_new_tokens": 12, "rng": 0, "return_state": True}
        return sampler.sample(["their model", "the logits"], **options).state.predicted_tokens

    np.testing.assert_array_equal(sample(small), sample(params))


def main():
    """With their classes as they are, and with the block replaced."""
    model = gm.nn.Gemma4_E2B(config=CONFIG)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    # The sampler makes its cache of the dtype of the first array of all, which in a compressed
    # embedding would be uint32.
    small = df11_jax.compress_params(params, include="^layer_")
    report = df11_jax.size_report(small)
    print(f"{report.nbytes_before:,} bytes, compressed {report.nbytes:,}")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(folder)
        compare(model, tokenizer, params, small)
        print("as it is: the same logits and tokens")
        jax.clear_caches()  # the model is one and the same to their nn.jit
        _modules.Block = compressed(_modules.Block)
        compare(model, tokenizer, params, small)
        print("decompressed block by block: the same logits and tokens")


if __name__ == "__main__":
    main()
