"""Makes `fixtures/tiny_llama`: a random model, and what DFloat11's own library makes of it.

    pip install dfloat11==0.5.0 torch transformers
    python tests/published/make_tiny_llama.py

The library needs CuPy and a GPU to be imported and to decode, but not to encode; where CuPy is
missing, something empty takes its place.
"""

import copy
import importlib.util
import shutil
import sys
import types
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "fixtures" / "tiny_llama"

PATTERN_DICT = {
    "lm_head": [],
    r"model\.embed_tokens": [],
    r"model\.layers\.\d+": [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ],
}

README = """\
A random model with the architecture of Llama, and the same compressed by DFloat11 {dfloat11}
(Apache-2.0, see LICENSE) with dahuffman {dahuffman}, once with a file for each unit and once as one
file. `tests/published/make_tiny_llama.py` made it all.
"""


def make_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, weights in model.state_dict().items():
            values = 0.02 * random.standard_normal(tuple(weights.shape), np.float32)
            if name == "model.layers.0.mlp.up_proj.weight":
                # Rare exponents, hence long codes, and all that is special: zeros and subnormals.
                values *= np.float32(2) ** np.round(random.exponential(2.5, values.shape))
                values.flat[:8] = [0, -0.0, 1e-40, -1e-40, 1e-38, 2.0**100, -(2.0**112), 2.0**-126]
            weights.copy_(torch.from_numpy(values) + ("norm" in name))
    return model


def import_dfloat11() -> types.ModuleType:
    class RawModule:
        def __init__(self, path: str) -> None: ...

        def get_function(self, name: str) -> None: ...

    stand_ins = {
        "cupy": {"RawModule": RawModule},
        # setuptools no longer has it.
        "pkg_resources": {"resource_filename": lambda package, name: name},
    }
    for name, content in stand_ins.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(content)
    from dfloat11 import dfloat11

    return dfloat11


def main() -> None:
    dfloat11 = import_dfloat11()
    shutil.rmtree(HERE, ignore_errors=True)
    model = make_model()
    model.save_pretrained(HERE / "original")
    for style in ("sharded", "single"):
        dfloat11.compress_model(
            copy.deepcopy(model),
            PATTERN_DICT,
            str(HERE / style),
            save_single_file=style == "single",
            check_correctness=False,
        )
    versions = {name: distribution(name).version for name in ("dfloat11", "dahuffman")}
    (HERE / "README").write_text(README.format(**versions))
    licence = next(f for f in distribution("dfloat11").files if f.name == "LICENSE")
    shutil.copy(licence.locate(), HERE / "LICENSE")
    for path in HERE.rglob("generation_config.json"):
        path.unlink()
    for path in HERE.rglob("*.*"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
