"""What XLA makes of Flax models with compressed parameters on a GPU; needs none."""

from gpu_compiler import needs_gpu_compiler, run_script

pytestmark = needs_gpu_compiler

# Dense blocks, of (token loop, gradient), and whether compressed weights are copied.
LIMITS = {
    "linen scan": (1.05, 1.05, False),
    "linen nn.scan of compressed": (1.75, 1.75, True),
    "linen unrolled compressed": (1.05, 1.05, False),
    "nnx remat": (0.6, 0.6, False),
    "nnx nnx.scan of remat": (0.9, 1.4, True),
    "nnx scan_blocks": (1.05, 1.05, False),
}


def test_memory_and_copies():
    programs = run_script("compile_flax_for_gpu.py")
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
