"""Computes, with transformers, what the tests compare with, and writes it to a file.

    pip install ".[test-hf]"
    python tests/models/transformers_logits.py

The weights are drawn by numpy, as in the tests, so that only logits and tokens need to be kept.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import families

EXPECTED = Path(__file__).with_suffix(".npz")
TOKENS = 8
POSITIONS = (7, 8, 23)  # of the logits that are kept: both sides of the sliding window


def compute(family: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits at all positions of the prompts, and the greedy tokens after them."""
    import torch
    import transformers

    path = families.write_family(folder / family, family)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # transformers reads this field of Gemma 3, and leaves it to the caller to pass it on.
    cap = families.CONFIGS[family].get("attn_logit_softcapping")
    options = {} if cap is None else {"softcap": cap}

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, use_cache=False, **options).logits

    tokens = torch.tensor(families.prompts())
    length = tokens.shape[1]
    first = logits(tokens).numpy()
    for _ in range(TOKENS):
        tokens = torch.cat([tokens, logits(tokens)[:, -1:].argmax(-1)], dim=1)
    return first, tokens[:, length:].numpy().astype(np.int32)


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families.CONFIGS:
            logits, tokens = compute(family, Path(folder))
            arrays[f"{family}/logits"] = logits[:, POSITIONS].astype(np.float32)
            arrays[f"{family}/tokens"] = tokens
    np.savez_compressed(EXPECTED, **arrays)


if __name__ == "__main__":
    main()
