"""Verdict rules: what the answer caused scores 0, what the infrastructure caused is invalid, nothing is invented."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch

from lit_posttrain.rewards import PerSampleReward, RewardError, RewardFunction, judge
from lit_posttrain.rewards.base import NO_FUNCTION, to_verdict
from lit_posttrain.types import Sample, Verdict


def sample(completion="c", answer="1", **columns):
    return Sample("p", completion, [1, 2, 3], "stop", answer, columns)


class Scripted(RewardFunction):
    """Returns the next of its scripted results; remembers what it was asked."""

    def __init__(self, *results, weight=1.0, name=None):
        super().__init__(weight, name)
        self.results = list(results)
        self.asked = []

    def __call__(self, samples):
        self.asked.append(list(samples))
        result = self.results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result


class Each(PerSampleReward):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def score(self, sample):
        return self.function(sample)


def test_weighted_sum():
    a = Scripted([Verdict(1.0), Verdict(0.5)], weight=2.0, name="a")
    b = Scripted([Verdict(0.25), Verdict(0.0, "not_applicable")], weight=-1.0, name="b")
    found = judge([a, b], [sample(), sample()])
    assert found.names == ["a", "b"]
    assert found.rewards.tolist() == [1.75, 1.0]  # weight of b is ignored where it does not apply
    assert found.valid.tolist() == [True, True]
    assert found.scores[0].tolist() == [1.0, 0.25]
    assert math.isnan(found.scores[1, 1])
    assert found.verdicts[1][1].status == "not_applicable"
    assert found.reasons == [{}, {"not_applicable": 1}]


def test_scored_zero_is_valid_and_its_reason_is_counted():
    found = judge(
        [Scripted([Verdict(0.0, reason="wrong"), Verdict(0.0, reason="wrong"), Verdict(1.0)])], [sample()] * 3
    )
    assert found.valid.tolist() == [True] * 3
    assert found.rewards.tolist() == [0, 0, 1]
    assert found.reasons == [{"wrong": 2}]


def test_only_invalid_samples_are_asked_again_and_once():
    samples = [sample(str(i)) for i in range(3)]
    f = Scripted([Verdict(1.0), Verdict(0.0, "invalid", "lost"), Verdict(0.0, "invalid", "lost")],
                 [Verdict(0.5), Verdict(0.0, "invalid", "lost")])  # fmt: skip
    found = judge([f], samples)
    assert f.asked == [samples, samples[1:]]
    assert found.valid.tolist() == [True, True, False]
    assert found.rewards.tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(found.scores[2, 0])
    assert found.reasons == [{"lost": 1}]


@pytest.mark.trap(19)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1.0", [1.0], 1j, object(), 10**400])
def test_unusable_value_is_invalid_and_its_neighbours_are_unharmed(value):
    found = judge([Each(lambda s: value if s.completion == "bad" else 1.0)], [sample(), sample("bad"), sample()])
    assert found.valid.tolist() == [True, False, True]
    assert found.rewards.tolist() == [1.0, 0.0, 1.0]
    assert torch.isfinite(found.rewards).all()
    assert sum(found.reasons[0].values()) == 1


def test_one_invalid_function_makes_the_sample_invalid():
    lost = [Verdict(1.0, "invalid")]
    found = judge([Scripted([Verdict(1.0)], name="a"), Scripted(lost, lost, name="b")], [sample()])
    assert found.valid.tolist() == [False]
    assert found.rewards.tolist() == [0.0]
    assert found.scores[0, 0] == 1.0


@pytest.mark.trap(19)
def test_sample_without_any_judge_is_invalid():
    other = [Verdict(0.0, "not_applicable")]
    found = judge([Scripted(other, name="a"), Scripted(other, name="b")], [sample()])
    assert found.valid.tolist() == [False]
    assert found.reasons == [{NO_FUNCTION: 1}, {NO_FUNCTION: 1}]


def test_raising_function_is_invalid_and_logged_once(caplog):
    f = Scripted(ValueError("boom"), ValueError("boom"), KeyError("x"), [Verdict(1.0)] * 2)
    assert judge([f], [sample()] * 2).valid.tolist() == [False, False]
    found = judge([f], [sample()] * 2)
    assert found.valid.tolist() == [True, True]
    assert [r.getMessage() for r in caplog.records if "boom" in r.getMessage()] == [
        "reward function Scripted: raised ValueError: boom (said once)"
    ]


def test_raising_on_one_sample_is_that_sample_alone():
    def score(s):
        if s.completion == "bad":
            raise ZeroDivisionError
        return 1.0

    found = judge([Each(score)], [sample(), sample("bad")])
    assert found.valid.tolist() == [True, False]
    assert found.reasons == [{"ZeroDivisionError": 1}]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(stop):
    with pytest.raises(stop):
        judge([Scripted(stop())], [sample()])

    def score(s):
        raise stop

    with pytest.raises(stop):
        judge([Each(score)], [sample()])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_values_stops_the_run(count):
    with pytest.raises(RewardError, match=rf"Scripted.*expected 2, got {count}"):
        judge([Scripted([Verdict(1.0)] * count)], [sample()] * 2)


@pytest.mark.parametrize("result", [None, 1.0, "ab", {"a": 1}, Verdict(1.0), [1.0, 1.0]])
def test_wrong_type_of_result_is_invalid(result):
    found = judge([Scripted(result, result)], [sample()] * 2)
    assert found.valid.tolist() == [False, False]
    assert found.rewards.tolist() == [0.0, 0.0]


def test_malformed_verdicts_are_invalid():
    strange = [Verdict(math.nan), Verdict(None), Verdict(1.0, "fine"), Verdict("1")]
    assert judge([Scripted(list(strange), list(strange))], [sample()] * 4).valid.tolist() == [False] * 4


@pytest.mark.parametrize(
    ("value", "score"),
    [(True, 1.0), (2, 2.0), (0.5, 0.5), (Fraction(1, 2), 0.5), (np.float32(0.5), 0.5), (np.array([2]), 2.0),
     (torch.tensor(3), 3.0), (torch.tensor([0.25]), 0.25)],
)  # fmt: skip
def test_numbers_of_every_kind(value, score):
    assert to_verdict(value) == Verdict(score)


def test_names_must_differ_and_functions_exist():
    with pytest.raises(ValueError, match="two functions are called 'Each'"):
        judge([Each(lambda s: 1.0), Each(lambda s: 0.0)], [sample()])
    with pytest.raises(ValueError, match="rewards"):
        judge([], [sample()])
    with pytest.raises(ValueError, match="weight"):
        Each(lambda s: 1.0, weight=math.nan)


def test_no_samples():
    found = judge([Each(lambda s: 1.0)], [])
    assert found.scores.shape == (0, 1)
    assert found.rewards.shape == found.valid.shape == (0,)


def test_equal_scores_give_bitwise_equal_rewards():
    f = [Each(lambda s: 0.7, weight=0.1, name="a"), Each(lambda s: 0.3, weight=0.7, name="b")]
    rewards = judge(f, [sample()] * 8).rewards
    assert rewards.max() == rewards.min()


def test_a_function_of_weight_0_is_only_watched() -> None:
    """What it says, or fails to say, moves neither rewards nor which samples count."""

    class Fixed(RewardFunction):
        def __init__(self, name: str, verdicts: list[Verdict], weight: float = 1.0):
            super().__init__(weight, name)
            self.verdicts = verdicts

        def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
            return self.verdicts[: len(samples)]

    bad, absent, good = Verdict(0.0, "invalid", "x"), Verdict(0.0, "not_applicable"), Verdict(2.0)
    samples = [Sample("q", "a", [1], "stop", None, {})] * 3
    main = Fixed("main", [good, good, absent])
    watched = Fixed("watched", [bad, good, good], weight=0.0)
    alone, both = judge([main], samples), judge([main, watched], samples)
    assert both.rewards.tolist() == alone.rewards.tolist() == [2.0, 2.0, 0.0]
    assert both.valid.tolist() == alone.valid.tolist() == [True, True, False]
    assert both.scores[1:, 1].tolist() == [2.0, 2.0]
    # Where nothing is learned from, as in an evaluation, what is watched decides.
    assert judge([watched], samples[:2]).valid.tolist() == [False, True]


def test_what_fp32_cannot_hold_is_no_reward() -> None:
    """Alone or as a sum; an infinite reward would make every advantage of its group NaN."""
    assert to_verdict(1e39).status == to_verdict(-1e300).status == "invalid"
    assert to_verdict(3e38).score == 3e38

    class Huge(PerSampleReward):
        def score(self, sample: Sample) -> float:
            return 3e38

    samples = [Sample("q", "a", [1], "stop", None, {})]
    assert judge([Huge(name="a")], samples).valid.tolist() == [True]
    assert judge([Huge(name="a"), Huge(name="b")], samples).valid.tolist() == [False]
