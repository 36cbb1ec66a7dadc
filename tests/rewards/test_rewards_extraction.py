"""What counts as the answer of a completion."""

import gc
import time

import pytest

from lit_posttrain.rewards.extraction import MAX_ANSWER, extract_answer


@pytest.mark.trap(38)
@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} is it", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\fbox{7}", "7"),
        ("\\boxed{1}. Wait, that is wrong. \\boxed{2}", "2"),
        ("\\boxed{5}, as above \\boxed{ 5 }", "5"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("\\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>x</think><answer> 5 </answer>", "5"),
        ("<answer>it is \\boxed{5}</answer>", "5"),
        ("The answer is 5.", "5"),
        ("The final answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("**Answer:** 3.5", "3.5"),
        ("1+1\n#### 2", "2"),
        ("The answer is 4. Wait, I made an error. The answer is 5.", "5"),
    ],
)
def test_takes(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.trap(38)
@pytest.mark.parametrize(
    "completion",
    [
        "", " ", "5", "it is 2+3 = 5", "\\boxed{5", "\\boxed{1} \\boxed{5", "\\boxed", "\\boxed 5", "\\boxed{}",
        "\\boxed{1} then \\boxed{2}", "\\boxed{2} then \\boxed{1} then \\boxed{2}", "<think>\\boxed{5}",
        "<think>\\boxed{5}</think>", "\\boxed{5}<think>", "<answer>1</answer><answer>1</answer>", "<answer>1",
        "1</answer>", "</answer>1<answer>", "<answer></answer>", "\\phantom{\\boxed{5}}", "\\cancel{x \\boxed{5}}",
        "{\\phantom{ {a} \\boxed{5}}}", "<!-- \\boxed{5} -->", "The answer is not \\boxed{5}", "x \\ne \\boxed{5}",
        "The answer is not 5", "\\boxed{5} Wait, no.", "The answer is 5. The answer is 6.",
        "<answer>5</answer> but the answer is 6", "<answer>5</answer> or \\boxed{6}",
        "I tried 7, 6, then 5, and gave up", "\\boxed{" + "5" * (MAX_ANSWER + 1) + "}",
    ],
)  # fmt: skip
def test_leaves(completion):
    assert extract_answer(completion) is None


def test_truncated_has_no_answer():
    for completion in ("\\boxed{5}", "<answer>5</answer>", "#### 5"):
        assert extract_answer(completion) == "5"
        assert extract_answer(completion, stop_reason="length") is None


@pytest.mark.parametrize(
    "hostile",
    [
        "a ", "\\boxed{", "<answer>", " ", "$", "answer is ", "\\boxed{1} wait ", "\\phantom{", "{", "answer to ",
        "\\boxed{1}", "not ", "could ", "</think>", "answer:", "####", "\\", "*", "is is the ", "\\boxed{\\boxed{1}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("tail", ["", "\\boxed{1}", "answer is 5", "}" * 1000])
def test_time_is_linear(hostile, tail):
    def seconds(characters):
        repeats = characters // len(hostile)
        gc.disable()  # what it costs depends on all objects of the session, as in timeit
        try:
            start = time.process_time()
            extract_answer(hostile * repeats + tail)
            extract_answer("\\boxed{1}" + hostile * repeats)
            return time.process_time() - start
        finally:
            gc.enable()

    whole = seconds(200_000)
    # Quadratic would take minutes. Where checked types and a slow or busy CPU take two seconds, growth decides: linear
    # is 4 times a quarter of the text, quadratic 16.
    assert whole < 2.0 or whole < 8 * seconds(50_000)
