"""Exact answers, as text and as integers."""

import pytest

from lit_posttrain.rewards import ExactAnswer
from lit_posttrain.types import Sample


def sample(completion, gold="25", stop="stop"):
    return Sample("p", completion, [1], stop, gold, {})


def integer(completion, gold="25", **kwargs):
    return ExactAnswer(kind="integer", **kwargs)([sample(completion, gold)])[0]


@pytest.mark.trap(38)
@pytest.mark.parametrize("text", ["25", "025", "+25", " 25 ", "25.", "25.0", "$25$", "\\text{25}"])
def test_integer_spellings(text):
    assert integer(f"\\boxed{{{text}}}").score == 1.0


@pytest.mark.trap(38)
@pytest.mark.parametrize(
    "text", ["26", "-25", "2 5", "25, 26", "25 or 26", "50/2", "2^5", "٢٥", "25x", "25.5", "0x19", "1e2", ""]
)
def test_integer_refusals(text):
    assert integer(f"\\boxed{{{text}}}").score == 0.0


def test_integer_thousands_and_range():
    free = {"minimum": None, "maximum": None}
    assert integer("<answer>1,234,567</answer>", "1234567", **free).score == 1.0
    assert integer("<answer>12,34</answer>", "1234", **free).score == 0.0
    assert integer("<answer>1234</answer>", "234").reason == "unparsable"  # outside 0..999: no vote either
    assert ExactAnswer("integer").extract(sample("\\boxed{1000}")) is None
    assert ExactAnswer("integer").extract(sample("\\boxed{007}")) == "7"


def test_integer_digits_are_bounded():
    free = {"minimum": None, "maximum": None}
    digits = "7" * 1900
    assert integer(f"\\boxed{{{digits}}}", digits, **free).score == 1.0
    assert integer(f"\\boxed{{{digits[:-1]}8}}", digits, **free).score == 0.0
    assert integer(f"\\boxed{{{'7' * 100_000}}}", digits, **free).score == 0.0
    with pytest.raises(ValueError, match="4000 digits"):
        ExactAnswer("integer", **free).check_answer("7" * 4001)


@pytest.mark.parametrize("gold", [None, "", "  ", "abc", "1000", "-1", "1/2", "NaN", "1e3"])
def test_unusable_integer_gold(gold):
    with pytest.raises(ValueError, match="ExactAnswer"):
        ExactAnswer("integer").check_answer(gold)


def test_gold_that_slipped_through_is_invalid_not_zero():
    assert integer("\\boxed{25}", "abc").status == "invalid"
    assert ExactAnswer()([sample("\\boxed{25}", None)])[0].status == "not_applicable"


def test_text():
    assert ExactAnswer()([sample("<answer> New \n York </answer>", "new york")])[0].score == 1.0
    assert ExactAnswer(ignore_case=False)([sample("<answer>new york</answer>", "New York")])[0].score == 0.0
    assert ExactAnswer()([sample("<answer>New York City</answer>", "New York")])[0].score == 0.0
    ExactAnswer().check_answer("New York")
    with pytest.raises(ValueError, match="gold"):
        ExactAnswer().check_answer(None)


def test_extract_from():
    both = "\\boxed{25} <answer>26</answer>"
    assert ExactAnswer(extract_from="answer_tag").extract(sample(both)) == "26"
    assert ExactAnswer(extract_from="boxed").extract(sample(both)) == "25"
    assert ExactAnswer(extract_from="answer_tag").extract(sample("\\boxed{25}")) is None
    assert ExactAnswer(extract_from="boxed").extract(sample("<answer>25</answer>")) is None
    assert ExactAnswer(extract_from="boxed").extract(sample("the answer is 25")) is None


def test_truncated():
    verdict = ExactAnswer()([sample("\\boxed{25}", stop="length")])[0]
    assert verdict == (0.0, "scored", "truncated")


def test_reasons():
    assert integer("no idea").reason == "no_answer"
    assert integer("\\boxed{x}").reason == "unparsable"
    assert integer("\\boxed{24}").reason == "wrong"


def test_range_is_checked():
    with pytest.raises(ValueError, match="minimum"):
        ExactAnswer("integer", minimum=5, maximum=4)
