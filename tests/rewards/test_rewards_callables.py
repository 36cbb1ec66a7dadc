"""Python callables with TRL's reward signature, run unchanged."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch

from lit_posttrain.rewards import PythonReward, RewardError, RewardFunction, judge
from lit_posttrain.types import Sample


def samples(n=2, prompt="p", **columns):
    return [
        Sample(prompt, f"completion {i}", [i, i], "stop", str(i), {k: v[i] for k, v in columns.items()})
        for i in range(n)
    ]


def scores(function, given, **kwargs):
    return [v.score for v in PythonReward(function, **kwargs)(given)]


def shortness(completions, **kwargs):
    return [-len(c) for c in completions]


def test_receives_what_trl_passes():
    seen = {}

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(locals())
        log_metric("half", 0.5)
        log_metric("half", 1.5)
        log_extra("note", ["a", "b"])
        return [0.0, 1.0]

    function = PythonReward(reward)
    function.begin_iteration(7)
    assert [v.score for v in function(samples(solution=["s0", "s1"], difficulty=[1, 2]))] == [0.0, 1.0]
    assert seen["prompts"] == ["p", "p"]
    assert seen["completions"] == ["completion 0", "completion 1"]
    assert seen["completion_ids"] == [[0, 0], [1, 1]]
    assert seen["trainer_state"].global_step == 7
    assert seen["kwargs"] == {"solution": ["s0", "s1"], "difficulty": [1, 2], "answer": ["0", "1"]}
    assert function.pop_logs() == ({"half": 1.0}, {"note": ["a", "b"]})
    assert function.pop_logs() == ({}, {})


def test_messages_arrive_as_messages():
    prompt = [{"role": "user", "content": "q"}]

    def reward(prompts, completions):
        assert prompts == [prompt] * 2
        assert completions[1] == [{"role": "assistant", "content": "completion 1"}]
        return [1, 1]

    assert scores(reward, samples(prompt=prompt)) == [1.0, 1.0]


def test_without_kwargs_only_named_arguments_are_passed():
    assert scores(lambda completions, solution: [float(s) for s in solution], samples(solution=["1", "2"])) == [
        1.0,
        2.0,
    ]


def test_column_of_the_data_wins_over_the_gold_answer():
    assert scores(lambda answer, **_: [float(a) for a in answer], samples(answer=["8", "9"])) == [8.0, 9.0]


def test_missing_column_names_it_and_those_there_are():
    with pytest.raises(RewardError, match=r"<lambda> needs solution.*there are: answer, difficulty"):
        PythonReward(lambda completions, solution: [0, 0])(samples(difficulty=[1, 2]))


def test_async_function_and_async_object():
    async def reward(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    class Judge:
        async def __call__(self, completions, **kwargs):
            return [2.0] * len(completions)

    assert scores(reward, samples()) == [1.0, 1.0]
    assert scores(Judge(), samples()) == [2.0, 2.0]
    assert PythonReward(Judge()).name == "Judge"


@pytest.mark.parametrize("returned", [(1, 0.5), np.array([1, 0.5]), torch.tensor([1, 0.5])])
def test_sequences_of_every_kind(returned):
    assert scores(lambda **_: returned, samples()) == [1.0, 0.5]


@pytest.mark.trap(19)
def test_none_nan_and_wrong_types():
    verdicts = PythonReward(lambda **_: [None, math.nan, math.inf, "1", 1.0])(samples(5))
    assert [v.status for v in verdicts] == ["not_applicable", "invalid", "invalid", "invalid", "scored"]


@pytest.mark.parametrize("returned", [[], [1.0], [1.0] * 3, np.zeros(3)])
def test_wrong_count(returned):
    with pytest.raises(RewardError, match=rf"half.*expected 2, got {len(returned)}"):
        judge([PythonReward(lambda **_: returned, name="half")], samples())


@pytest.mark.parametrize("returned", [None, 1.0, "ab", {"a": 1, "b": 2}, torch.tensor(1.0)])
def test_wrong_type_of_result(returned):
    assert [v.status for v in PythonReward(lambda **_: returned)(samples())] == ["invalid"] * 2


def test_raising_is_invalid_retried_once_and_logged_once(caplog):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        raise ConnectionError("server gone")

    found = judge([PythonReward(reward)], samples())
    assert calls == [2, 2]
    assert found.valid.tolist() == [False, False]
    assert found.reasons == [{"ConnectionError": 2}]
    assert len([r for r in caplog.records if "server gone" in r.getMessage()]) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(kind):
    def reward(**kwargs):
        raise kind

    with pytest.raises(kind):
        judge([PythonReward(reward)], samples())


def test_hang_is_bounded():
    async def sleeping(**kwargs):
        await asyncio.sleep(60)

    for function in (lambda **_: time.sleep(5), sleeping):
        start = time.monotonic()
        verdicts = PythonReward(function, timeout=0.1)(samples())
        assert time.monotonic() - start < 3.0
        assert [(v.status, v.reason) for v in verdicts] == [("invalid", "timeout")] * 2


def test_timeout_range():
    with pytest.raises(ValueError, match="timeout"):
        PythonReward(shortness, timeout=0.0)


def test_no_samples():
    assert PythonReward(shortness)([]) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_builds_from_a_dotted_path(monkeypatch):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[RewardFunction])
    config = {
        "rewards": [
            {
                "class_path": "lit_posttrain.rewards.PythonReward",
                "init_args": {"function": "statistics.fmean", "weight": 0.5, "timeout": 3.0},
            },
            {"class_path": "lit_posttrain.rewards.MathVerifier", "init_args": {"extract_from": "boxed", "workers": 2}},
            {"class_path": "lit_posttrain.rewards.ExactAnswer", "init_args": {"kind": "integer", "maximum": None}},
            {"class_path": "lit_posttrain.rewards.ThinkFormat", "init_args": {"require_stop": False}},
            {"class_path": "lit_posttrain.rewards.OverlongPenalty", "init_args": {"max_length": 20, "cache": 4}},
            {"class_path": "lit_posttrain.rewards.LengthPenalty", "init_args": {"target": 20, "side": "both"}},
            {"class_path": "lit_posttrain.rewards.ReasoningGymReward", "init_args": {"threshold": 0.9}},
        ]
    }
    built = parser.instantiate_classes(parser.parse_object(config)).rewards
    assert [f.name for f in built] == [
        "fmean", "MathVerifier", "ExactAnswer", "ThinkFormat", "OverlongPenalty", "LengthPenalty", "ReasoningGymReward",
    ]  # fmt: skip
    assert built[0].function([1, 3]) == 2
    assert (built[0].weight, built[1].pool.workers, built[2].maximum) == (0.5, 2, None)


def test_annotation_is_what_the_parser_needs():
    assert PythonReward.__init__.__annotations__["function"] == Callable[..., Any]
