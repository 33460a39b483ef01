"""What is read from `config.json`, and what is refused."""

import copy
import dataclasses
import json
import math

import families
import numpy as np
import pytest
from known_configs import KNOWN

from df11_jax.models import Experts, Rope, UnsupportedModelError, read_config
from df11_jax.models._rope import frequencies
from df11_jax.models._weights import list_places, tensor_shape

LLAMA, PHI = families.CONFIGS["llama"], families.CONFIGS["phi3"]
QWEN_3_5, GEMMA_4 = families.CONFIGS["qwen3_5_text"], families.CONFIGS["gemma4_text"]

# How many billions of parameters there are, and of how many of the layers the window slides.
SIZES = {
    "Llama-3-8B": (8.030, 0),
    "Llama-3.1-8B": (8.030, 0),
    "Llama-3.1-70B": (70.554, 0),
    "Llama-3.1-405B": (405.853, 0),
    "Llama-3.2-1B": (1.236, 0),
    "Llama-3.2-3B": (3.213, 0),
    "Qwen2.5-0.5B": (0.494, 0),
    "Qwen2.5-7B": (7.616, 0),
    "Qwen3-0.6B": (0.596, 0),
    "Qwen3-8B": (8.191, 0),
    "Qwen3-14B": (14.768, 0),
    "QwQ-32B": (32.764, 0),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1.777, 0),
    "DeepSeek-R1-0528-Qwen3-8B": (8.191, 0),
    "Qwen3-30B-A3B": (30.532, 0),
    "Mixtral-8x7B": (46.703, 0),
    "Mistral-7B-v0.1": (7.242, 32),
    "Mistral-Small-24B": (23.572, 0),
    "Ministral-8B": (8.020, 0),  # with a window of all positions
    "Ministral-3-8B": (8.490, 0),
    "Phi-3-mini-4k": (3.821, 32),
    "Phi-4-mini": (3.836, 0),
    "Phi-4": (14.660, 0),
    "glm-4-9b-chat": (9.400, 0),
    "GLM-4-9B-0414": (9.400, 0),
    "gemma-3-270m": (0.268, 15),
    "gemma-3-1b": (1.000, 22),
    "gemma-3-4b": (3.880, 29),
    "gemma-3-12b": (11.766, 40),
    "gemma-3-27b": (27.009, 52),
    "Qwen3.5-27B": (26.896, 0),
    "Qwen3.5-35B-A3B": (34.661, 0),
    "gemma-4-31B": (30.697, 50),
    "gemma-4-E2B": (4.629, 28),
    "gemma-4-E4B": (7.463, 35),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models(name):
    config = read_config(KNOWN[name])
    parameters = sum(math.prod(tensor_shape(places)) for places in list_places(config).values())
    assert (round(parameters / 1e9, 3), sum(config.sliding)) == SIZES[name]


@families.needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KNOWN)
def test_known_models_are_what_transformers_takes_them_for(name, tmp_path):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    families.skip_unknown(KNOWN[name]["model_type"])
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(KNOWN[name]))
    config, text = read_config(KNOWN[name]), theirs.get_text_config()
    text.allow_global_per_layer_attribute_access = True
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert (config.head_dim, config.vocab) == (head_dim, text.vocab_size)
    assert (config.heads, config.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert (config.max_length, config.norm_eps) == (text.max_position_embeddings, text.rms_norm_eps)
    assert config.tied == theirs.tie_word_embeddings
    if config.full is None:
        assert config.attention_scale == getattr(text, "query_pre_attn_scalar", head_dim) ** -0.5
    else:
        full = text.per_layer_config[config.layers - 1]
        assert config.full.head_dim == full.head_dim
        assert config.full.kv_heads == full.num_key_value_heads
        assert config.shared_layers == text.num_kv_shared_layers
    window = getattr(text, "sliding_window", None)
    same = "sliding_attention" if window else "full_attention"
    types = getattr(text, "layer_types", None) or [same] * config.layers
    sliding = tuple(type_ == "sliding_attention" for type_ in types)
    assert config.sliding == sliding or (window >= config.max_length and not any(config.sliding))
    linear = tuple(type_ == "linear_attention" for type_ in types)
    assert any(linear) == (config.delta_rule is not None)
    assert config.delta_rule is None or config.delta_rule.layers == linear
    assert config.window == (window if any(config.sliding) else 0)
    length = config.max_length
    for type_, rope in (("full_attention", config.rope), ("sliding_attention", config.local_rope)):
        if config.full and type_ == "full_attention":
            head_dim = config.full.head_dim
        else:
            head_dim = config.head_dim
        nested = type_ in text.rope_parameters
        fields = text.rope_parameters[type_] if nested else text.rope_parameters
        fraction = fields.get("partial_rotary_factor", 1.0)
        turning, factor = frequencies(Rope(fields["rope_theta"], fraction=fraction), head_dim), 1.0
        if fields["rope_type"] != "default":
            scale = ROPE_INIT_FUNCTIONS[fields["rope_type"]]
            inner = type_ if nested else None
            turning, factor = scale(text, "cpu", seq_len=length, layer_type=inner)
        np.testing.assert_allclose(frequencies(rope, head_dim, length), turning, rtol=1e-5)
        assert rope.attention_factor == pytest.approx(factor)
        assert rope.query_growth == fields.get("llama_4_scaling_beta", 0)
    # As it writes them itself, in its own new way, and without what is the default.
    theirs.save_pretrained(tmp_path)
    assert read_config(json.loads((tmp_path / "config.json").read_text())) == config


def test_llama_3_2():
    config = read_config(KNOWN["Llama-3.2-1B"])
    assert (config.dim, config.hidden, config.layers, config.vocab) == (2048, 8192, 16, 128256)
    assert (config.heads, config.kv_heads, config.head_dim) == (32, 8, 64)
    assert config.rope == Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert config.tied and not any(config.sliding)
    assert config.norm_eps == 1e-5 and config.attention_scale == 1 / 8


def test_mixtures_choose_no_more_experts_than_there_are():
    config = read_config(KNOWN["Qwen3-30B-A3B"])
    assert (config.hidden, config.experts) == (768, Experts(128, 8, normed=True))
    for change in ({"num_experts_per_tok": 129}, {"num_experts": 10_000}):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name} is {change[name]}, expected an integer"):
            read_config(KNOWN["Qwen3-30B-A3B"] | change)


def test_gemma_3_files_say_little():
    config = read_config(KNOWN["gemma-3-4b"])
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab, config.window) == (262_208, 1024)
    assert [i for i in range(34) if not config.sliding[i]] == [5, 11, 17, 23, 29]
    assert config.rope == Rope(1_000_000.0, "linear", 8.0)
    assert config.local_rope == Rope(10_000.0)
    assert config.tied and config.activation == "gelu_tanh" and config.attention_scale == 1 / 16
    assert config.embedding_scale == math.sqrt(2560)
    assert config.attention_softcap is None and config.logit_softcap is None


def test_what_is_said_about_all_of_a_multimodal_model_holds_for_its_text():
    outer = KNOWN["gemma-3-4b"]
    assert not read_config(outer | {"tie_word_embeddings": False}).tied
    inner = outer | {"text_config": outer["text_config"] | {"tie_word_embeddings": False}}
    assert not read_config(inner).tied
    assert read_config(inner | {"tie_word_embeddings": True}).tied
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        read_config(outer | {"quantization_config": {"quant_method": "bitsandbytes"}})


def test_old_and_new_ways_to_say_the_same():
    new = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new["rope_parameters"] = {"rope_theta": 500_000.0} | LLAMA["rope_scaling"]
    assert read_config(new) == read_config(LLAMA)

    gemma = families.CONFIGS["gemma3_text"]
    new = {k: v for k, v in gemma.items() if not k.startswith("rope")}
    new["layer_types"] = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    assert read_config(new) == read_config(gemma)


def test_windows_of_all_positions_are_none():
    mistral = families.CONFIGS["mistral"]
    assert all(read_config(mistral | {"sliding_window": 511}).sliding)
    for window in (512, 4096, None):
        config = read_config(mistral | {"sliding_window": window})
        assert not any(config.sliding) and config.window == 0
    unsaid = {k: v for k, v in mistral.items() if k != "sliding_window"}
    assert read_config(unsaid | {"max_position_embeddings": 4097}).window == 4096


def test_full_layers_of_gemma_4_have_heads_of_their_own():
    config = read_config(GEMMA_4)
    assert (config.full.head_dim, config.full.kv_heads) == (32, 2)
    heads = {"head_dim": 32, "num_key_value_heads": 2}
    said = {k: v for k, v in GEMMA_4.items() if "global" not in k}
    assert read_config(said | {"per_layer_config": {i: heads for i in ("01", "3", "5")}}) == config
    # As many as in other layers, unless values are keys; and the last layer is always full.
    types = ["sliding_attention"] * 6
    config = read_config(GEMMA_4 | {"attention_k_eq_v": False, "num_kv_shared_layers": 0})
    assert config.full.kv_heads == 1 and not config.full.keys_are_values
    config = read_config(GEMMA_4 | {"layer_types": types, "num_kv_shared_layers": 0})
    assert config.sliding == (*[True] * 5, False)
    for none in (0, None):
        assert read_config(GEMMA_4 | {"hidden_size_per_layer_input": none}).per_layer is None


def test_text_of_mistral_3():
    text = families.CONFIGS["ministral3"]
    assert read_config({"model_type": "mistral3", "text_config": text}) == read_config(text)
    unsaid = {k: v for k, v in families.CONFIGS["mistral"].items() if k != "model_type"}
    outer = {"model_type": "mistral3", "text_config": unsaid, "tie_word_embeddings": True}
    assert read_config(outer) == read_config(
        families.CONFIGS["mistral"] | {"tie_word_embeddings": True}
    )


def test_dynamic_changes_nothing_up_to_the_length_of_the_model():
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    plain = read_config(LLAMA | {"rope_scaling": None})
    assert read_config(LLAMA | {"rope_scaling": scaling}) == plain


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_queries_grow_whatever_the_frequencies_are(kind):
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 8}
    fields = families.CONFIGS["ministral3"]
    for name in ("rope_parameters", "rope_scaling"):
        said = {"rope_parameters": None, name: scaling | {"llama_4_scaling_beta": 0.5}}
        rope = read_config(fields | said).rope
        assert (rope.query_growth, rope.original_length) == (0.5, 8)
    if kind != "yarn":
        assert read_config(fields | {"rope_parameters": scaling}).rope.query_growth == 0


def test_yarn_that_was_added_makes_models_longer():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read_config(LLAMA | {"rope_scaling": scaling}).max_length == 2048


def test_null_for_a_window_means_nothing_said_where_layers_say_it():
    fields = families.CONFIGS["gemma3_text"]
    said = {key: value for key, value in fields.items() if key != "sliding_window"}
    assert read_config(said | {"sliding_window": None}) == read_config(said)


def test_null_means_nothing_said():
    nulls = {"rope_scaling": None, "num_key_value_heads": None, "head_dim": None}
    config = read_config(LLAMA | nulls)
    assert config.rope == Rope(500_000.0)
    assert (config.kv_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize(
    "more",
    [
        {"query_pre_attn_scalar": 99},
        {"attn_logit_softcapping": 3.0},
        {"final_logit_softcapping": 3.0},
        {"hidden_activation": "gelu_pytorch_tanh"},
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 16},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    ],
    ids=lambda more: [*more][-1],
)
def test_fields_of_other_families_mean_nothing(more):
    llama = KNOWN["Llama-3.2-1B"]
    assert read_config(llama | more) == read_config(llama)


def test_windows_from_the_first_layer_on():
    fields = families.CONFIGS["qwen2"] | {"use_sliding_window": True, "sliding_window": 8}
    config = read_config(fields | {"max_window_layers": 0})
    assert config.window == 8 and all(config.sliding)


def test_families_differ_where_they_should():
    read = {family: read_config(fields) for family, fields in families.CONFIGS.items()}
    biased = {"llama-biases", "qwen2", "qwen2_moe", "glm"}
    assert {name for name, c in read.items() if c.qkv_bias} == biased
    assert {name for name, c in read.items() if c.output_bias} == {"llama-biases"}
    with_norms = {"qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text"}
    with_norms |= {"gemma3_text", "gemma4_text"}
    assert {name for name, c in read.items() if c.qk_norm} == with_norms
    post_norms = {"gemma3_text", "gemma4_text", "glm4"}
    assert {name for name, c in read.items() if c.post_norms} == post_norms
    sliding = {"mistral", "ministral", "mixtral", "qwen3", "gemma3_text", "gemma4_text"}
    assert {name for name, c in read.items() if any(c.sliding)} == sliding


def test_frequencies():
    plain = frequencies(Rope(10_000.0), 64)
    np.testing.assert_allclose(plain, 10_000.0 ** (-np.arange(32) / 32), rtol=1e-6)
    np.testing.assert_allclose(frequencies(Rope(10_000.0, "linear", 4.0), 64), plain / 4)
    scaled = frequencies(Rope(10_000.0, "llama3", 8.0, 1.0, 4.0, 512), 64)
    turns = 512 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any()
    assert np.all((scaled < plain)[between] & (scaled > plain / 8)[between])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the model_type None is not supported, only llama, mistral, "),
        ({"model_type": ["llama"]}, r"the model_type \['llama'\] is not supported"),
        ({"model_type": "deepseek_v3"}, "'deepseek_v3' is not supported"),
        (families.CONFIGS["qwen3_moe"] | {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] is not"),
        (
            families.CONFIGS["qwen2_moe"] | {"decoder_sparse_step": 2},
            "decoder_sparse_step 2 is not",
        ),
        (LLAMA | {"rope_scaling": {"type": "mrope"}}, "rope_scaling: the RoPE type 'mrope'"),
        (LLAMA | {"rope_scaling": {"rope_type": ["yarn"]}}, "the RoPE type \\['yarn'\\]"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "truncate": False}}, "truncate"),
        (PHI | {"sliding_window": 100}, "sliding_window 100 together with the RoPE type longrope"),
        (
            families.CONFIGS["mistral"] | {"layer_types": ["full_attention"] * 3},
            "layer_types of several kinds .* mistral",
        ),
        (families.CONFIGS["glm"] | {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        (LLAMA | {"hidden_act": "relu2"}, "the activation 'relu2'"),
        (LLAMA | {"hidden_act": {"silu": 1}}, "the activation {'silu': 1}"),
        *(
            (
                LLAMA | {"quantization_config": {"bits": 4, "quant_method": method, "x": [0] * 99}},
                rf"the weights are quantized \('{method}'\), which is not supported; get the model",
            )
            for method in ("fp8", "gptq", "awq", "bitsandbytes")
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": 0.5}},
            "rope_scaling: partial_rotary_factor 0.5",
        ),
        (LLAMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (LLAMA | {"is_causal": False}, "is_causal False is not supported"),
        (LLAMA | {"layer_types": ["linear_attention"] * 3}, "the layer type 'linear_attention'"),
        (QWEN_3_5 | {"layer_types": ["sliding_attention"] * 4}, "only full_attention and linear"),
        (QWEN_3_5 | {"attn_output_gate": False}, "attn_output_gate False .* qwen3_5_text, only Tr"),
        (QWEN_3_5 | {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh' is not"),
        (GEMMA_4 | {"enable_moe_block": True}, "a mixture of experts, .* such as gemma-4-31B"),
        (GEMMA_4 | {"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        (GEMMA_4 | {"per_layer_config": {"1": {}}}, "per_layer_config of the layers '1' is not"),
        (
            GEMMA_4 | {"per_layer_config": {i: {"hidden_size": 3} for i in "135"}},
            "per_layer_config: 'hidden_size' is not supported, only head_dim and",
        ),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(fields, "somewhere/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing, expected an integer from 1 to "),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer from 1 to "),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776, expected an integer from 1 to "),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads to be a multiple"),
        ({"head_dim": 15}, "head_dim to be even"),
        ({"layer_types": ["full_attention"]}, "layer_types .* expected a list of 3"),
        ({"model_type": "gemma3"}, "text_config is None, expected a JSON object"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected a JSON object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "a list of 8 positive"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [-1] * 8}}, "short_factor is -1"),
        ({"rope_scaling": {"type": "yarn"}, "rope_theta": 1}, "rope_theta is 1, expected more"),
        ({"model_type": "glm", "partial_rotary_factor": 0.2}, "an even part of a head of 128"),
        (QWEN_3_5 | {"linear_num_value_heads": 3}, "is 3, expected a multiple of 2 key heads"),
        (GEMMA_4 | {"num_kv_shared_layers": 5}, "num_kv_shared_layers is 5, expected layers of"),
        (GEMMA_4 | {"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6, expected an integer"),
        (GEMMA_4 | {"vocab_size_per_layer_input": 299}, "is 299, expected at least vocab_size"),
    ],
)
def test_fields_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=rf"somewhere/config\.json.*{message}"):
        read_config(LLAMA | change, "somewhere/config.json")


def test_configurations_by_hand_that_would_be_others():
    config = read_config(LLAMA)
    with pytest.raises(ValueError, match="activation is 'gelu', expected one of silu, gelu_tanh"):
        dataclasses.replace(config, activation="gelu")
    with pytest.raises(ValueError, match="kind is 'dynamic', expected one of default, linear,"):
        dataclasses.replace(config.rope, kind="dynamic")
