import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from df11_jax import published
from df11_jax.published import _expressions

# As in checkpoints on the model hubs, those for language models and those for diffusion models.
PUBLISHED = [
    ("lm_head", ["lm_head"], ["lm_head.x", "xlm_head", ""]),
    (r"model\.embed_tokens", ["model.embed_tokens"], ["model_embed_tokens"]),
    (r"model\.layers\.\d+", ["model.layers.0", "model.layers.123"], ["model.layers.", "a.1"]),
    (r"transformer_blocks.\d+", ["transformer_blocks.7"], ["single_transformer_blocks.7"]),
    (r"distilled_guidance_layer", ["distilled_guidance_layer"], ["distilled_guidance_layer.0"]),
    (r"input_blocks\.4\.1\.transformer_blocks\.\d+", ["input_blocks.4.1.transformer_blocks.0"], []),
    (r"output_blocks\.[678]\.0", ["output_blocks.6.0", "output_blocks.8.0"], ["output_blocks.9.0"]),
    (r"encoder\.lyric_encoder\.layers\.\d++", ["encoder.lyric_encoder.layers.12"], []),
    (r"(?:language_model\.)?lm_head", ["lm_head", "language_model.lm_head"], ["model.lm_head"]),
    (
        r"(?:language_model\.model|model\.language_model)\.layers\.\d+",
        ["language_model.model.layers.1", "model.language_model.layers.22"],
        ["language_model.model.model.language_model.layers.1"],
    ),
    (r"^model\.(layers|blocks)\.[0-9]+$", ["model.blocks.10"], ["model.blocks.10a"]),
    (".*", ["", "a.b"], ["a\nb"]),
]


@pytest.mark.parametrize(("expression", "matched", "others"), PUBLISHED)
def test_those_of_checkpoints(expression, matched, others):
    for name in matched:
        assert _expressions.fullmatch(expression, name), name
        assert re.fullmatch(expression, name), name
    for name in others:
        assert not _expressions.fullmatch(expression, name), name


CHARACTERS = ["a", "b", "1", r"\.", ".", r"\d", r"\w", "[ab]", "[^a]", "[0-9]", r"[\d.-]", "_"]
PIECES = st.builds(str.__add__, st.sampled_from(CHARACTERS), st.sampled_from(["", "?", "*", "+"]))
EXPRESSIONS = st.recursive(
    st.one_of(PIECES, st.sampled_from(["^", "$", "|"])),
    lambda inner: st.builds(
        "{}{}){}".format,
        st.sampled_from(["(", "(?:"]),
        st.lists(inner, max_size=4).map("".join),
        st.sampled_from(["", "?"]),
    ),
)


@given(
    st.lists(EXPRESSIONS, max_size=5).map("".join),
    st.sampled_from(["", "", r"\d++"]),
    st.text("ab1._-\né٣", max_size=6),
)
def test_means_what_it_means_in_python(expression, end, text):
    expected = re.fullmatch(expression + end, text) is not None
    assert _expressions.fullmatch(expression + end, text) == expected


REPEATED_GROUPS = ["(a+)+b", "(a)*", "(a)??"]
OTHER_GROUPS = ["(?!a)", "(?i)a", "(?P<x>a)"]
OTHER_REPETITIONS = ["a{2}", "a**", "a*?", "a++b", r"\d++|a", "?", "|*", "^*"]
OTHER_CHARACTERS = [r"\s", r"\1", "\\", "]", "[", "[]", "[z-a]", "[[a]]", "[a--b]"]


@pytest.mark.parametrize(
    "expression",
    [*REPEATED_GROUPS, *OTHER_GROUPS, *OTHER_REPETITIONS, *OTHER_CHARACTERS, "(", "a)"],
)
def test_what_is_not_supported(expression):
    with pytest.raises(ValueError, match=r"supported|closed|range"):
        _expressions.check(expression)


@pytest.mark.parametrize(
    "expression", [".*" * 1999 + "!", r"\w*" * 1333, "a?" * 999 + "a" * 999, "(a|a)?" * 666 + "b"]
)
def test_no_expression_takes_long(expression):
    # Python's matcher would outlast the sun.
    assert not _expressions.fullmatch(expression, "a" * 500 + "-")


def test_a_dict_names_what_it_cannot_match():
    with pytest.raises(ValueError, match=r"write: pattern_dict: '\(a\+\)\+' is not .* '\+' is not"):
        published.write({}, "unused", {"(a+)+": []})
    with pytest.raises(ValueError, match="of 4,001 characters, expected up to 4,000"):
        published.write({}, "unused", {"a" * 4001: []})
