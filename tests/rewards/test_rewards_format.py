"""The shape of a completion, anchored at both ends."""

import pytest

from lit_posttrain.rewards import ThinkFormat
from lit_posttrain.types import Sample

GOOD = "<think>why</think><answer>5</answer>"


def score(completion, stop="stop", **kwargs):
    return ThinkFormat(**kwargs)([Sample("p", completion, [1], stop, None, {})])[0].score


@pytest.mark.parametrize(
    "completion",
    [GOOD, "<think>a</think> <answer>b</answer>", "\n<think>\na\n\nb\n</think>\n\n<answer>\nb\n</answer>\n",
     "<think>a <b> </i> c</think><answer>x < y</answer>"],
)  # fmt: skip
def test_accepts(completion):
    assert score(completion) == 1.0


@pytest.mark.trap(37)
@pytest.mark.parametrize(
    "completion",
    [
        "", "5", "<think>a</think>", "<answer>5</answer>", "<think>a</think>5",
        GOOD + " done", GOOD + "\ndone", "Sure.\n" + GOOD, "x" + GOOD, GOOD + GOOD, GOOD + "\n" + GOOD,
        "<think>a</think>so<answer>5</answer>", "<answer>5</answer><think>a</think>",
        "<think>a<think>b</think></think><answer>5</answer>", "<think>a</think><think>b</think><answer>5</answer>",
        "<think>a</think><answer>5</answer><answer>6</answer>", "<think>a<answer>5</answer></think>",
        "<think>a</think><answer><answer>5</answer></answer>", "<think>a<answer>5</think></answer>",
        "<think>a<think>b</think><answer>5</answer>", "<think>a</think><answer>5<answer>6</answer>",
        "<think>a</think><answer>5", "<think>a<answer>5</answer>", "a</think><answer>5</answer>",
        "<think>a</think>5</answer>", "</think>a<think><answer>5</answer>", "<think>a</think></answer>5<answer>",
        "<THINK>a</THINK><ANSWER>5</ANSWER>", "<think >a</think><answer>5</answer>", GOOD + "</answer>",
    ],
)  # fmt: skip
def test_refuses(completion):
    assert score(completion) == 0.0


@pytest.mark.trap(37)
def test_truncated_scores_only_when_allowed():
    assert score(GOOD, "length") == 0.0
    assert score(GOOD, "length", require_stop=False) == 1.0


def test_huge_input_is_linear():
    assert score("<think>" * 300_000) == 0.0
    assert score("<think>" + "a\n " * 300_000 + "</think>" + " " * 300_000 + "<answer>5</answer>") == 1.0
