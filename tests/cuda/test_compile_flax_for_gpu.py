"""What XLA makes of Flax models with compressed parameters on a GPU; needs none."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_flax_for_gpu.py")

# Dense blocks, of (token loop, gradient), and whether compressed weights are copied.
LIMITS = {
    "linen scan": (1.05, 1.05, False),
    "linen nn.scan of compressed": (1.75, 1.75, True),
    "linen unrolled compressed": (1.05, 1.05, False),
    "nnx remat": (0.6, 0.6, False),
    "nnx nnx.scan of remat": (0.9, 1.25, True),
    "nnx scan_blocks": (1.05, 1.05, False),
}


@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason='needs XLA\'s compiler for CUDA: pip install "jax[cuda13]"',
)
@pytest.mark.skipif(
    not importlib.util.find_spec("df11_jax._native_cuda"),
    reason="needs the CUDA decoder: install df11_jax with nvcc on PATH",
)
def test_memory_and_copies():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    programs = [json.loads(line) for line in result.stdout.splitlines()]
    blocks = {(p["model"], p["program"]): p for p in programs}
    for model, (loop, gradient, copies) in LIMITS.items():
        for program, limit in (("token_loop", loop), ("gradient", gradient)):
            found = blocks[model, program]
            assert found["decode_calls"] > 0
            assert found["temporary_blocks"] < limit, found
            assert copies or found["words_moved"] < 1000, found

    plain, small = (blocks[f"lora {weights}", "train_step"] for weights in ("plain", "compressed"))
    total = {p["model"]: p["arguments"] + p["temporary"] for p in (plain, small)}
    assert total["lora compressed"] < 0.8 * total["lora plain"]
