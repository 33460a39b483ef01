"""What is particular about the `config.json` of mixtures of experts."""

from typing import Any

from df11_jax._brief import brief
from df11_jax.models._config import Experts
from df11_jax.models._hf_fields import MOST_LAYERS, Fields, UnsupportedModelError

# The values that transformers assumes, of families that differ from others by their experts only.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    },
    "qwen2_moe": {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 4096,
    },
    "qwen3_moe": {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
}
_MOST_EXPERTS = 2**17  # of all layers together

_WITH_SHARED_EXPERT = ("qwen2_moe", "qwen3_5_moe_text")
# Families whose experts have normed probabilities, whatever norm_topk_prob says.
_NORMED = ("mixtral", "qwen3_5_moe_text")


def read_mlp(f: Fields, family: str) -> tuple[int, Experts]:
    """The hidden units of the MLP, or of each expert, and the experts that take its place.

    Raises:
        UnsupportedModelError: only some of the layers have experts.
        ValueError: a field is missing or wrong; the message names it.
    """
    if family not in (*DEFAULTS, *_WITH_SHARED_EXPERT):
        return f.size("intermediate_size"), Experts()
    for name, harmless in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if f.get(name) not in (None, harmless):
            raise UnsupportedModelError(
                f"{f.where}: {name} {brief(f.get(name))} is not supported, only mixtures of "
                "experts in all layers are"
            )
    # transformers 5 writes what Mixtral calls it, and reads both.
    name = "num_experts" if f.get("num_local_experts") is None else "num_local_experts"
    count = f.size(name, most=_MOST_EXPERTS // f.size("num_hidden_layers", most=MOST_LAYERS))
    shared = f.size("shared_expert_intermediate_size") if family in _WITH_SHARED_EXPERT else 0
    experts = Experts(
        count=count,
        per_token=f.size("num_experts_per_tok", most=count),
        normed=family in _NORMED or f.flag("norm_topk_prob"),
        shared_hidden=shared,
    )
    return f.size("intermediate_size" if family == "mixtral" else "moe_intermediate_size"), experts
