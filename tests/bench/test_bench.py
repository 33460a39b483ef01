import json
import re
import statistics

import jax
import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner

import df11_jax
from df11_jax import bench
from df11_jax.bench import decoding, peers, timing
from df11_jax.bench.blocks import BLOCKS
from df11_jax.cli import _commands

TINY = ["--quick", "--max-weights", str(2**18)]


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(decoding, "Effort", lambda **_: timing.Effort(2, 0.001, 0.001))
    monkeypatch.setattr(bench.workload, "_CACHE_BYTES", 2**22)
    return lambda *options: CliRunner().invoke(_commands.commands, ["bench", *TINY, *options])


def test_json(invoke, monkeypatch):
    monkeypatch.setattr(peers, "measure_zipnn", lambda weights: {"weights": weights})
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"]["platform"] == "cpu"
    assert report["device"]["decoder"] == "compiled"
    assert report["weights"] == "normal(0, 0.02)"
    assert [d["name"] for d in report["decodings"]] == ["256 K", "Llama-3.1-8B / 32"]
    assert [d["matrices"] for d in report["decodings"]] == [1, 7]
    for figures in report["decodings"]:
        assert figures["code_bits"] == 12
        assert 10.5 < figures["bits_per_weight"] < 10.9
        assert len(figures["seconds"]) == 2
        bits = figures["bits_per_weight"]
        limit = figures["copy_bytes_per_second"] * 16 / (16 + bits)
        assert figures["limit_bytes_per_second"] == pytest.approx(limit)
        rate = 2 * figures["weights"] / statistics.median(figures["seconds"])
        assert figures["output_bytes_per_second"] == pytest.approx(rate)
        # No more is asserted of times that a loaded machine may stretch.
        assert figures["share_of_limit"] == pytest.approx(rate / limit)
        assert figures["kernel_seconds"] is None
    assert report["scan"]["blocks"] == 8
    assert report["scan"]["distinct_blocks"] == 4
    assert report["scan"]["code_bits"] == 12
    assert not report["errors"] and not report["skipped"]


def test_text_and_plot(invoke, monkeypatch, tmp_path):
    matplotlib.use("agg")
    monkeypatch.setattr(peers, "_is_installed", lambda module: False)
    plot = tmp_path / "share.png"
    result = invoke("--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert "Llama-3.1-8B / 32, 7 matrices" in result.stdout
    assert re.search(r"^256 K +0\.3 M +12 bits +10\.\d{3} ", result.stdout, re.MULTILINE)
    assert "Scan over 8 compressed blocks" in result.stdout
    assert "codes of at most 12 bits):" in result.stdout
    assert "ZipNN is not installed: pip install zipnn" in result.stdout
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/share.png", "nowhere/share.png: there is no directory to write it to"),
        ("share.doc", "share.doc: expected a file such as plot.png or plot.svg, not .doc"),
    ],
)
def test_a_plot_that_cannot_be_written(invoke, tmp_path, name, message):
    result = invoke("--plot", str(tmp_path / name))
    assert result.exit_code == 2
    assert result.stderr.endswith(f"{message}\n")
    assert not result.stdout


@pytest.mark.slow
def test_zipnn(invoke):
    pytest.importorskip("zipnn", reason="needs ZipNN: pip install zipnn")
    (peer,) = json.loads(invoke("--json").stdout)["peers"]
    assert peer["name"] == "ZipNN"
    assert peer["weights"] == 2**18
    assert 10 < peer["bits_per_weight"] < 11
    assert peer["output_bytes_per_second"] > 0
    assert peer["df11_jax_output_bytes_per_second"] > 0


def test_wrong_bits_are_an_error(invoke, monkeypatch):
    decode = bench.workload.decode_slices

    def wrong(arrays, index, **options):
        return [w.at[..., -1].add(1) for w in decode(arrays, index, **options)]

    monkeypatch.setattr(bench.workload, "decode_slices", wrong)
    monkeypatch.setattr(peers, "measure_zipnn", lambda weights: {})
    result = invoke("--json")
    assert result.exit_code == 1
    assert "256 K: 256 K, slice 0 of 5, does not come back bit for bit" in result.stderr
    report = json.loads(result.stdout)
    assert not report["decodings"]
    assert set(report["errors"]) == {"256 K", "Llama-3.1-8B / 32", "scan"}


def test_a_gpu_on_which_plain_xla_decodes(invoke, monkeypatch):
    monkeypatch.setattr(peers, "_is_installed", lambda module: False)
    kernels = [timing.Kernel("loop_add_fusion", 1e-3)]
    monkeypatch.setattr(bench.measure, "profile_kernels", lambda program: kernels)
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["scan"]["kernel_seconds"] is report["scan"]["kernel_overhead"] is None
    assert report["decodings"][0]["kernel_seconds"] > 0


def test_programs_use_a_weight_of_each_matrix():
    """Where its own operations decode, XLA leaves out matrices of which nothing is used."""
    workload = bench.workload.make_workload("block", {"up": (64, 256), "down": (256, 64)}, 8)
    firsts = [df11_jax.decompress(array)[:, 0, 0] for array in workload.arrays]
    expected = np.asarray(firsts, np.float32).sum()
    for make in (bench.programs.scan_program, bench.programs.decode_program):
        assert float(make(workload).run()) == pytest.approx(expected, rel=1e-4)


def test_too_little_memory(invoke, monkeypatch):
    monkeypatch.setattr(decoding, "free_bytes", lambda: 2**20)
    monkeypatch.setattr(peers, "_is_installed", lambda module: False)
    result = invoke()
    assert result.exit_code == 0, result.output
    assert re.search(r"Not measured: 256 K: takes 0\.\d GiB, free are 0\.0", result.stdout)
    assert "GB/s out" in result.stdout


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("Llama-3.1-8B", 218.1),
        ("Llama-3.1-70B", 855.6),
        ("Qwen3-14B", 330.3),
        ("Gemma-3-27B", 412.9),
    ],
)
def test_block_shapes(model, millions):
    block = BLOCKS[model]
    assert block.size / 1e6 == pytest.approx(millions, abs=0.05)
    assert len(block.matrices) == 7
    assert 8 * block.divided(2).size == 2 * block.size


def test_kernel_durations():
    """Of what XLA's profiler writes on a GPU: streams, and lines that sum them up."""
    text = """
    planes {
      name: "/device:GPU:0"
      lines {
        name: "Stream #7(Compute)"
        events { metadata_id: 1 duration_ps: 2000000 }
        events { metadata_id: 2 duration_ps: 1000000 }
        events { metadata_id: 1 duration_ps: 4000000 }
      }
      lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000 } }
      event_metadata { key: 1 value { id: 1 name: "df11::native::decode_kernel" } }
      event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
    }
    planes { name: "/host:CPU" lines { name: "Stream" events { metadata_id: 1 } } }
    """
    data = jax.profiler.ProfileData
    profile = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(text))
    assert timing.read_durations(profile, "decode_kernel") == pytest.approx([2e-6, 4e-6])
    assert len(timing.read_durations(profile, "")) == 3
    empty = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(""))
    with pytest.raises(RuntimeError, match="CUPTI"):
        timing.read_durations(empty, "")
