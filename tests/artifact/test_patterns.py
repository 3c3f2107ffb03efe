"""Our matcher says what Python's `re` says, and says it in bounded time."""

from __future__ import annotations

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from registry.artifact.errors import ArtifactRefused
from registry.artifact.patterns import PatternSet

NAMES = [f"model.layers.{layer}.{target}" for layer in (0, 1, 11) for target in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]
EXPRESSIONS = [
    r".*q_proj",
    r"q_proj",
    r".*\.(q|k)_proj$",
    r"^model\.layers\.[01]\.self_attn\.[qk]_proj",
    r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+",
    r"(?:.*?(?:language|text).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"^(?!.*mlp).*_proj",
    r".*(?<=self_attn\.)q_proj",
    r".*(?<!self_attn\.)\w+_proj",
    r".*\Bq_proj|.*\bup_proj",
    r"[^q]*_proj",
    r"[^\W\d]+\..*",
    r".*\D1\D.*",
    r"(.*\.){3,4}q_proj",
    r"(?:a{0}|)model.*",
    r".{29,30}",
    r"(?P<layer>.*)k_proj\Z",
    r"\Amodel.*",
    r"",
    r"layers.1.mlp.up_proj",
    r"model.layers.1.mlp.up_proj",
    r"odel.layers.1.mlp.up_proj",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_as_python_says(expression: str, name: str) -> None:
    patterns = PatternSet()
    assert patterns.full_match(expression, name, field="f") == (re.fullmatch(expression, name) is not None)
    assert patterns.suffix_match(expression, name, field="f") == (re.match(rf"(.*\.)?({expression})$", name) is not None)


atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", r"\b", "^", "$", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)"])
expressions = st.recursive(
    atoms,
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?"])).map(lambda pair: f"({pair[0]}){pair[1]}")
    ),
    max_leaves=6,
)


@given(expressions, st.text(alphabet="ab.1", max_size=6))
def test_as_python_says_for_any_expression(expression: str, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = re.fullmatch(expression, name) is not None
    except (re.error, FutureWarning):
        assume(False)
    assert PatternSet().full_match(expression, name, field="f") == expected


@pytest.mark.parametrize("expression", ["((.+)+)+!", "(a|a)*b", "(.*)*x" * 8, "(([a-z.]+)*_?)*[A-Z]", "(a?){1000}b", "(|a){0,1000000}b"])
def test_what_python_cannot_finish_is_quick(expression: str) -> None:
    started_s = time.process_time()
    with contextlib.suppress(ArtifactRefused):  # or a refusal, when the budget is spent
        assert not PatternSet().full_match(expression, "model.layers.0.self_attn.q_proj" + "a" * 30, field="f")
    assert time.process_time() - started_s < 5


@pytest.mark.parametrize("expression", [r"(a)\1", "(?>a)b", "a++", "(?i)a", "(?i:a)", "(a", "[", "a{3,2}", "(?(1)a|b)", "*", "(a)" * 700])
def test_what_is_not_taken(expression: str) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        PatternSet().full_match(expression, "aaa", field="target_modules")
    assert (refused.value.code, refused.value.field) == ("bad_pattern", "target_modules")


def test_the_budget_is_shared_by_all_expressions_of_a_config() -> None:
    patterns = PatternSet(budget=5_000)
    with pytest.raises(ArtifactRefused, match="takes too long"):
        for number in range(1000):
            patterns.suffix_match(f".*{number}", "model.layers.0.self_attn.q_proj", field="alpha_pattern")


def test_names_of_a_large_model_are_cheap() -> None:
    """EVA writes one full name a module: 560 of them, asked 560 times."""
    names = [f"model.layers.{layer}.mlp.{target}_proj" for layer in range(80) for target in "abcdefg"]
    patterns, started_s = PatternSet(), time.process_time()
    for name in names:
        assert next(key for key in names if patterns.suffix_match(key, name, field="rank_pattern")) == name
    assert time.process_time() - started_s < 10
