import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner

from df11_jax.bench import product, product_programs, timing, workload
from df11_jax.bench.blocks import BLOCKS
from df11_jax.bench.product_check import check_products
from df11_jax.bench.product_figures import ProductFigures
from df11_jax.bench.product_measure import Product, Times
from df11_jax.bench.product_programs import compile_products, draw_rows, make_product_weights
from df11_jax.cli import _commands

MATRICES = {"gate": (128, 256), "up": (128, 256)}


@pytest.fixture(scope="module", autouse=True)
def few_calls():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "_CACHE_BYTES", 2**16)
        patch.setattr(product_programs, "_FEWEST_CALLS", 3)
        yield


@pytest.fixture(scope="module", autouse=True)
def in_no_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "Effort", lambda **_: timing.Effort(2, 0.001, 0.001))
        yield


@pytest.fixture(scope="module")
def figures():
    return product.run_product_bench(quick=True, max_weights=2**18)


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(product, "QUICK_ROWS", (8,))
    tiny = ["bench", "--product", "--quick", "--max-weights", str(2**18)]
    return lambda *options: CliRunner().invoke(_commands.commands, [*tiny, *options])


@pytest.fixture(scope="module")
def weights():
    return make_product_weights("gate_up", MATRICES)


def test_json(figures):
    report = json.loads(json.dumps(figures.as_json()))
    assert report["device"]["platform"] == "cpu"
    assert report["weights"] == "normal(0, 0.02)"
    assert not report["errors"] and not report["skipped"]
    products = report["products"]
    assert [(p["name"], p["rows"]) for p in products] == list(
        itertools.product(("qkv", "out", "gate_up", "down"), (1, 8, 64))
    )
    assert {p["model"] for p in products} == {"Llama-3.1-8B / 32"}
    assert [p["shape"] for p in products[::3]] == [[128, 192], [128, 128], [128, 896], [448, 128]]
    assert [p["matrices"] for p in products[::3]] == [3, 1, 2, 1]
    for figures in products:
        assert not figures["is_fused"] and figures["fused_seconds"] is None
        assert figures["code_bits"] == 12
        assert 10.5 < figures["bits_per_weight"] < 11
        assert 2**-10 < figures["error"] < 2**-8  # of rounding to bfloat16
        assert figures["error"] <= 1.1 * figures["plain_error"]
        assert figures["timed_by"] == "clock"
        seconds = statistics.median(figures["compressed"]["seconds"])
        plain = {way: statistics.median(t["seconds"]) for way, t in figures["plain"].items()}
        assert plain.keys() == {"x @ W", "x @ E.T"}
        assert plain[figures["plain_orientation"]] == min(plain.values())
        # No more is asserted of times that a loaded machine may stretch.
        assert figures["ratio"] == pytest.approx(seconds / min(plain.values()))
        read = figures["bits_per_weight"] * np.prod(figures["shape"]) / 8
        assert figures["bytes_per_second"] == pytest.approx(read / seconds)
    for rows, block in zip((1, 8, 64), report["blocks"], strict=True):
        together = [p for p in products if p["rows"] == rows]
        plain = sum(p["plain_best_seconds"] for p in together)
        assert block["rows"] == rows and block["fused"] == 0
        assert block["ratio"] == pytest.approx(sum(p["best_seconds"] for p in together) / plain)


def test_text(figures):
    text = str(figures)
    assert re.search(
        r"^Llama-3.1-8B / 32: codes of at most 12 bits, 1\d\.\d+ bits/weight$", text, re.MULTILINE
    )
    lines = [line.split() for line in text.splitlines()]
    assert [line[:5] for line in lines if line[:1] == ["qkv"]] == [
        ["qkv", "128", "x", "192", rows] for rows in ("1", "8", "64")
    ]
    assert all("decoded first" in " ".join(line) for line in lines if line[:1] == ["down"])
    sums = [line for line in lines if line[:1] == ["sum"]]
    assert [line[1:5] for line in sums] == [[n, "0", "of", "4"] for n in ("1", "8", "64")]
    assert "By the clock." in text


def test_command(invoke, tmp_path):
    matplotlib.use("agg")
    plot = tmp_path / "ratio.png"
    result = invoke("--model", "Qwen3-14B", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert "Qwen3-14B / 64: codes" in result.stdout and "Llama" not in result.stdout
    assert "  rows 8: " in result.stderr
    assert plot.stat().st_size > 1000


def test_all_models_and_rows(monkeypatch):
    measured = []
    monkeypatch.setattr(product, "_measure", lambda figures, *case: measured.append(case))
    product.run_product_bench(quick=False, max_weights=None)
    models = [re.sub(r" / \d+$", "", model) for model, *_ in measured]
    assert list(dict.fromkeys(models)) == list(BLOCKS)
    assert {rows for *_, rows, _ in measured} == {(1, 2, 4, 8, 16, 32, 64)}


def test_too_little_memory(invoke, monkeypatch):
    monkeypatch.setattr(product, "free_bytes", lambda: 2**16)
    result = invoke()
    assert result.exit_code == 0, result.output
    name = "Llama-3.1-8B / 32, gate_up"
    assert re.search(rf"Not measured: {name}: takes 0\.\d GiB, free are 0\.0", result.stdout)
    assert "FAILED" not in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--product", "--model", "GPT-2"], "--model: there is no GPT-2: expected Llama-3.1-8B, "),
        (["--model", "Llama-3.1-8B"], "--model is for --product"),
    ],
)
def test_no_such_model(options, message):
    result = CliRunner().invoke(_commands.commands, ["bench", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def one_result(results):
    return [results[0], results[1].at[-1, 17].add(0.5)]


def not_a_number(results):
    return [results[0].at[0, 3].set(jnp.nan), results[1]]


def swapped(results):
    return results[::-1]


@pytest.mark.parametrize("wrong", [one_result, not_a_number, swapped])
def test_a_wrong_product_is_found(weights, monkeypatch, wrong):
    dot = product_programs.dot
    monkeypatch.setattr(product_programs, "dot", lambda x, a: wrong(dot(x, a)))
    x = draw_rows(weights, 4)
    with pytest.raises(RuntimeError, match=r"products .* are wrong: \d+ of 2048 results for slice"):
        check_products(weights, x, compile_products(weights, x))


def test_a_wrong_slice_is_found(weights, monkeypatch):
    dot = product_programs.dot

    def first(x, matrices):
        return dot(x, [dataclasses.replace(a, index=jnp.int32(0)) for a in matrices])

    monkeypatch.setattr(product_programs, "dot", first)
    x = draw_rows(weights, 1)
    with pytest.raises(RuntimeError, match=r"are wrong: \d+ of 512 results for slice 1 of 2"):
        check_products(weights, x, compile_products(weights, x))


def test_a_less_exact_product_is_found(weights, monkeypatch):
    """Sums that are cut to bfloat16 instead of rounded are as near as others, but have an error."""
    dot = product_programs.dot

    def cut(x, matrices):
        sums = dot(x, matrices, preferred_element_type=jnp.float32)
        bits = [y.view(jnp.uint32) & jnp.uint32(0xFFFF0000) for y in sums]
        return [b.view(jnp.float32).astype(jnp.bfloat16) for b in bits]

    x = draw_rows(weights, 4)
    check_products(weights, x, compile_products(weights, x))
    monkeypatch.setattr(product_programs, "dot", cut)
    with pytest.raises(RuntimeError, match=r"compressed weights have an error of \d\.\d+e-03"):
        check_products(weights, x, compile_products(weights, x))


@pytest.mark.slow
def test_a_wrong_product_is_an_error(invoke, monkeypatch):
    dot = product_programs.dot

    def wrong(x, matrices):
        results = dot(x, matrices)
        return [2 * y for y in results] if x.shape == (8, 448) else results

    monkeypatch.setattr(product_programs, "dot", wrong)
    result = invoke("--json")
    assert result.exit_code == 1
    assert "products with compressed weights are wrong" in result.stderr
    report = json.loads(result.stdout)
    assert list(report["errors"]) == ["Llama-3.1-8B / 32, down, rows 8"]
    assert [figures["name"] for figures in report["products"]] == ["qkv", "out", "gate_up"]
    assert not report["blocks"]  # a sum of three would be none


def test_every_call_is_made(weights):
    """None is merged with another, and none is dropped."""
    x = draw_rows(weights, 2)
    programs = compile_products(weights, x)
    assert programs.compressed.calls == len(x) == 4
    for program in (programs.compressed, *programs.plain.values()):
        results = [np.concatenate(call, axis=1) for call in program.run()]
        for i, result in enumerate(results):
            expected = x[i].astype(np.float32) @ weights.columns(i % 2, np.arange(512)).astype(
                np.float32
            )
            np.testing.assert_allclose(result.astype(np.float32), expected, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_calls_take_the_memory_of_one():
    """On a CPU, what one call decodes, or makes float32, takes the place of what the last did.

    In a process of its own, with XLA's scheduler for CPUs, which the tests have turned off.
    """
    program = """
import jax, jax.numpy as jnp
from df11_jax.bench.product_programs import draw_rows, make_product_weights, product_calls
weights = make_product_weights("out", {"out": (128, 512)})
x = list(map(jnp.asarray, draw_rows(weights, 8)))
indices = [jnp.int32(0)] * len(x)
for chained in (True, False):
    for function, arguments in product_calls(weights, x, indices, chained=chained).values():
        compiled = jax.jit(function).lower(*arguments).compile()
        print(compiled.memory_analysis().temp_size_in_bytes / (128 * 512))
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-P", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    bytes_per_weight = list(map(float, result.stdout.split()))
    assert max(bytes_per_weight[:3]) < 2 + 4 + 1
    # Which it is to prevent: those of all calls, decoded, and as float32, which XLA now makes for
    # one order of plain weights only.
    least = min if jax.__version_info__ < (0, 11) else max
    assert least(bytes_per_weight[3:]) > 4 * 16
    assert bytes_per_weight[3] >= 2 * 16


def made_up(name="qkv", compressed=2e-5, plain=(1e-5, 3e-5), fused=1.5e-5):
    ways = zip(("x @ W", "x @ E.T"), plain, strict=True)
    return Product(
        model="Llama",
        name=name,
        shape=(4096, 4096),
        matrices=1,
        rows=1,
        code_bits=12,
        bits_per_weight=8.0,
        is_fused=True,
        error=0.001,
        plain_error=0.001,
        compressed=Times((4e-5, 6e-5, 5e-5), compressed),
        plain={way: Times((2e-5,), seconds) for way, seconds in ways},
        fused_seconds=fused,
    )


def test_kernels_come_before_the_clock():
    """Of made-up times: there are no such without a GPU."""
    one = made_up()
    assert one.timed_by == "kernels" and one.plain_orientation == "x @ W"
    assert one.ratio == pytest.approx(2) and one.fused_ratio == pytest.approx(1.5)
    assert one.clock_ratio == pytest.approx(2.5)
    assert one.bytes_per_second == pytest.approx(2**24 / 2e-5)
    other = made_up(plain=(1e-5, None))  # never a kernel's time over that by the clock
    assert other.timed_by == "clock"
    assert other.ratio == other.clock_ratio == pytest.approx(2.5)

    figures = ProductFigures("0", "0", {"name": "none"})
    figures.products = [made_up(name) for name in ("qkv", "out", "gate_up", "down")]
    (block,) = figures.blocks
    assert block.fused == 4
    assert block.ratio == pytest.approx(2) and block.fused_ratio == pytest.approx(1.5)
    assert "fused  20.0" in str(figures) and "4 of 4 fused  80.0" in str(figures)
    figures.products.pop()
    assert not figures.blocks


def test_products_of_a_block():
    for block in BLOCKS.values():
        merged = [m for matrices in block.products.values() for m in matrices.items()]
        assert dict(merged) == block.matrices and len(merged) == 7
        for matrices in block.products.values():
            assert len({k for k, _ in matrices.values()}) == 1
