"""Arbitrary text never raises out of any reward, and never earns one."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_posttrain.rewards import ExactAnswer, LengthPenalty, MathVerifier, OverlongPenalty, ThinkFormat, judge
from lit_posttrain.rewards.extraction import extract_answer
from lit_posttrain.types import Sample

PIECES = st.sampled_from(
    ["\\boxed{", "}", "{", "<think>", "</think>", "<answer>", "</answer>", "The answer is ", "#### ", "$", "\\frac",
     "17", "\\text{", ",", ".", "=", "not ", "Wait, ", " or ", "\\", "x", "^", "_", "(", ")", "\n",
     "%", "\\phantom{", "1/0", "√", "½"]
)  # fmt: skip
TEXT = st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=40).map("".join))


@pytest.fixture(scope="module")
def functions():
    pytest.importorskip("math_verify")
    functions = [
        MathVerifier(timeout=8.0), ExactAnswer("integer"), ExactAnswer("text", name="text"), ThinkFormat(),
        LengthPenalty(target=1), OverlongPenalty(max_length=4, cache=2),
    ]  # fmt: skip
    yield functions
    for function in functions:
        function.close()


# The gold answer appears in no piece: whatever earns the reward of a verifier would be a false positive.
@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from(["stop", "length"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_raises_or_is_rewarded_by_chance(functions, texts, stop):
    found = judge(functions, [Sample("p", text, [1, 2, 3], stop, "917", {}) for text in texts])
    assert found.rewards.isfinite().all()
    assert found.valid.all()
    for text, row in zip(texts, found.scores.tolist(), strict=True):
        assert "917" in text or row[:3] == [0.0, 0.0, 0.0]


@given(TEXT, st.sampled_from(["auto", "boxed", "answer_tag"]))
def test_an_extracted_answer_stands_in_the_text(text, source):
    answer = extract_answer(text, source)
    assert answer is None or all(part in text for part in answer.split(", "))


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " ", "\n"]), max_size=8).map("".join)
)
def test_format_agrees_with_a_parser_of_the_grammar(text):
    """The oracle walks through the grammar symbol by symbol instead of searching for tags."""
    rest, ok = text.lstrip(), True
    for opening, closing in (("<think>", "</think>"), ("<answer>", "</answer>")):
        ok = ok and rest.startswith(opening)
        body, end, rest = rest[len(opening) :].partition(closing)
        ok = ok and bool(end) and "<" not in body
        rest = rest.lstrip()
    ok = ok and not rest
    assert ThinkFormat()([Sample("p", text, [1], "stop", None, {})])[0].score == float(ok)
