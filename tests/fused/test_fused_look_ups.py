"""Look-ups in embeddings, of which not the whole table is decompressed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from linen_models import bf16
from payloads import assert_same_bits, count_decodes, random_weights

import df11_jax
import df11_jax.linen
import df11_jax.nnx
from df11_jax.linen import compressed

FUSED_EMBED = compressed(nn.Embed, methods=("__call__", "attend"), fused=True)

TABLE = (1024, 128)  # 16 bands
TOKENS_OF_TABLE = jnp.array([[3, 1023, 70], [5, -1, 2000]])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_look_ups_of_linen_decompress_bands(dtype):
    options = {"dtype": dtype, "param_dtype": jnp.bfloat16}
    plain = {"params": {"embedding": random_weights(TABLE)}}
    small = df11_jax.compress_params(plain, along_columns="embedding")
    embed, expected = FUSED_EMBED(*TABLE, **options), nn.Embed(*TABLE, **options)
    look_up = jax.jit(embed.apply)
    rows = look_up(small, TOKENS_OF_TABLE)
    assert rows.dtype == dtype
    assert rows.tobytes() == expected.apply(plain, TOKENS_OF_TABLE).tobytes()
    assert count_decodes(look_up, small, TOKENS_OF_TABLE) == TOKENS_OF_TABLE.size
    many = jnp.arange(100)
    assert look_up(small, many).tobytes() == expected.apply(plain, many).tobytes()
    with pytest.raises(ValueError, match="Input type must be an integer"):
        embed.apply(small, jnp.ones(3))
    # With pairs along rows, all of it.
    along_rows = df11_jax.compress_params(plain)
    assert count_decodes(look_up, along_rows, TOKENS_OF_TABLE) == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_look_ups_of_nnx_decompress_bands(dtype):
    embed = nnx.Embed(*TABLE, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    expected = embed(TOKENS_OF_TABLE)
    df11_jax.nnx.compress(embed, fused=True)
    look_up = nnx.jit(lambda embed, tokens: embed(tokens))
    rows = look_up(embed, TOKENS_OF_TABLE)
    assert rows.dtype == dtype
    assert rows.tobytes() == expected.tobytes()
    assert count_decodes(look_up, embed, TOKENS_OF_TABLE) == TOKENS_OF_TABLE.size
    with pytest.raises(ValueError, match="Input type must be an integer"):
        embed(jnp.ones(3))


class Scaled(nn.Embed):
    def __call__(self, inputs, offset=0):
        return super().__call__(inputs + offset) * 8

    def attend(self, query):
        return super().attend(query) + 1


def by_largest(*arrays, dtype=None, inexact=True):
    del dtype, inexact
    return [array / jnp.max(jnp.abs(array)) for array in arrays]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes on the CPU")
def test_methods_of_subclasses_are_called(fused_products):
    plain = {"params": {"embedding": random_weights(TABLE)}}
    small = df11_jax.compress_params(plain, along_columns="embedding")
    model = compressed(Scaled, methods=("__call__", "attend"), fused=True)(*TABLE, **bf16)
    expected = Scaled(*TABLE, **bf16)
    tokens = jnp.array([3, 200])
    look_up = jax.jit(lambda variables: model.apply(variables, tokens, 5))
    assert_same_bits(look_up(small), expected.apply(plain, tokens, 5))
    assert count_decodes(look_up, small) == 2
    query = random_weights((2, TABLE[1]), 1)
    attended = jax.jit(lambda variables: model.apply(variables, query, method="attend"))(small)
    assert_same_bits(attended, expected.apply(plain, query, method="attend"))
    assert fused_products
    # What looks at all of the table gets it.
    own = bf16 | {"promote_dtype": by_largest}
    rows = FUSED_EMBED(*TABLE, **own).apply(small, tokens)
    assert_same_bits(rows, nn.Embed(*TABLE, **own).apply(plain, tokens))
