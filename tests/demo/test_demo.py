import pytest
from click.testing import CliRunner

import df11_jax
from df11_jax import DF11Array, size_report
from df11_jax.cli import _commands
from df11_jax.demo import checkpoint, run


@pytest.mark.slow
def test_demo_command():
    result = CliRunner().invoke(_commands.commands, ["demo", "--tokens", "20"])
    assert result.exit_code == 0, result.output
    assert 'The "with" statement' in result.output
    assert "All 20 tokens and 5,120 logits are bit-identical" in result.output
    assert "bits per weight" in result.output


@pytest.mark.slow
def test_demo_fails_if_a_bit_differs(monkeypatch):
    decompress = df11_jax.decompress_params

    def wrong(params):
        params = decompress(params)
        embedding = params["embedding"]
        return params | {"embedding": embedding.at[101].set(2 * embedding[101])}

    monkeypatch.setattr(run.df11_jax, "decompress_params", wrong)
    result = CliRunner().invoke(_commands.commands, ["demo", "--tokens", "20"])
    assert result.exit_code == 1
    assert "from compressed and plain weights differ" in result.output


@pytest.mark.parametrize("tokens", ["0", "-1"])
def test_nothing_to_generate(tokens):
    result = CliRunner().invoke(_commands.commands, ["demo", "--tokens", tokens])
    assert result.exit_code == 2
    result = CliRunner().invoke(_commands.commands, ["demo", "--prompt", ""])
    assert result.exit_code == 2


def test_bundled_checkpoint():
    params = checkpoint.load_checkpoint()
    report = size_report(params)
    assert report.nbytes < 6e6
    assert report.bits_per_weight < 10.7
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, DF11Array)
    assert kernel.shape == (8, 192, 512)


@pytest.mark.slow
def test_bundled_checkpoint_was_trained():
    pytest.importorskip("optax", reason="needs optax: pip install 'df11_jax[train]'")
    from df11_jax.demo import train

    # Another Python version has other topics, but much the same.
    _, held_out = train.load_text()
    held_out = held_out[: len(held_out) // 4]  # all of it takes half a minute
    params = df11_jax.decompress_params(checkpoint.load_checkpoint())
    assert train.held_out_loss(params, held_out) < 1.25
