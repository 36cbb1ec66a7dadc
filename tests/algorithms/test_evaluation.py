"""Evaluation of scripted samples: what counts as right, what is written, and what the metrics say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer

from lit_posttrain.algorithms.evaluation import Evaluation, EvaluationConfig
from lit_posttrain.rewards import ExactAnswer, PythonReward, ThinkFormat
from lit_posttrain.rollout import RolloutEngine, SamplingParams
from lit_posttrain.types import Completion, Prompt, PromptBatch

TOKENIZER = byte_tokenizer()
STOP = TOKENIZER.eos_token_id
RIGHT, WRONG, BARE = "<think>t</think><answer>7</answer>", "<think>t</think><answer>8</answer>", "<answer>7</answer>"


class Script(RolloutEngine):
    """Says what it was told to, and notes how it was asked."""

    def __init__(self, lines: list[str]):
        self.lines, self.keys, self.temperatures = lines, [], set()

    def sync(self, policy: Any) -> None: ...

    def bind(self, tokenizer: Any) -> None: ...

    def generate(self, prompts: Any, sampling: SamplingParams, keys: Any, tick: Any = None) -> list[Completion]:
        self.keys += keys
        self.temperatures.add(sampling.temperature)
        said = [self.lines[i % len(self.lines)] for i in range(len(prompts))]
        return [Completion([*TOKENIZER.encode(s), STOP], [0.0] * (len(s) + 1), "stop", 1) for s in said]


def prompt(number: int) -> Prompt:
    return Prompt(number, f"{number}?", f"{number}?", TOKENIZER.encode(f"{number}?"), "", "7", {})


def evaluated(lines: list[str], rewards: list[Any], folder: Path, prompts: int = 2, **config: Any) -> tuple[dict, list]:
    evaluation = Evaluation(EvaluationConfig(samples=4, **config), SamplingParams(max_new_tokens=64), rewards)
    evaluation.begin(TOKENIZER, [STOP], torch.device("cpu"))
    engine = Script(lines)
    for i in range(prompts):
        evaluation.add(engine, PromptBatch([prompt(i)], [i]), 1, lambda finished: None)
    values, text = evaluation.finish(folder, 3, 0)
    rows = [json.loads(line) for line in (folder / "step-3.jsonl").read_text().splitlines()]
    assert len({tuple(k) for k in engine.keys}) == prompts * 4
    assert "7" in text
    return values, rows


def test_right_answers_votes_and_formats_of_known_samples(tmp_path: Path) -> None:
    rewards = [ThinkFormat(name="format"), ExactAnswer(extract_from="answer_tag", name="accuracy")]
    values, rows = evaluated([RIGHT, WRONG, BARE, "nothing"], rewards, tmp_path)
    # The verifier decides, not the first reward: BARE is right in the wrong form.
    assert [r["correct"] for r in rows[:4]] == [True, False, True, False]
    assert [r["vote"] for r in rows[:4]] == ["7", "8", "7", None]
    assert [r["rewards"]["format"] for r in rows[:4]] == [1, 1, 0, 0]
    assert rows[4]["prompt_id"] == 1
    assert [r["sample"] for r in rows] == [0, 1, 2, 3] * 2
    assert values["pass@1"] == pytest.approx(0.5)
    assert values["pass@4"] == 1.0
    assert values["maj@4"] == 1.0
    assert values["rewards/format/mean"] == pytest.approx(0.5)
    assert values["completions/clipped_ratio"] == 0.0
    assert values["completions/mean_length"] == pytest.approx(sum(r["tokens"] for r in rows) / 8)


def test_every_k_is_the_unbiased_estimate(tmp_path: Path) -> None:
    values, _ = evaluated([RIGHT, WRONG, WRONG, WRONG], [ExactAnswer(extract_from="answer_tag")], tmp_path, k=[1, 2, 3])
    assert values["pass@1"] == pytest.approx(1 / 4)
    assert values["pass@2"] == pytest.approx(1 / 2)
    assert values["pass@3"] == pytest.approx(3 / 4)
    assert "pass@4" not in values
    assert values["maj@4"] == 0.0


def test_a_sample_without_a_verdict_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if "8" in c else 1.0 for c in completions]

    values, rows = evaluated([RIGHT, WRONG, RIGHT, RIGHT], [PythonReward(broken)], tmp_path)
    assert [r["correct"] for r in rows[:4]] == [True, None, True, True]
    assert values["pass@1"] == 1.0
    assert "pass@4" not in values
    assert values["invalid"] == pytest.approx(1 / 4)
    assert "maj@4" not in values


def test_the_first_reward_decides_where_none_is_a_verifier(tmp_path: Path) -> None:
    def half(completions: list[str], **_: Any) -> list[float]:
        return [0.5 if "8" in c else 1.0 for c in completions]

    _, rows = evaluated([RIGHT, WRONG], [PythonReward(half)], tmp_path)
    assert [r["correct"] for r in rows[:4]] == [True, False, True, False]


def test_each_evaluation_asks_with_the_same_keys_and_its_own_temperature(tmp_path: Path) -> None:
    asked = []
    for _ in range(2):
        evaluation = Evaluation(
            EvaluationConfig(samples=2, temperature=0.3), SamplingParams(max_new_tokens=8), [ExactAnswer()]
        )
        evaluation.begin(TOKENIZER, [STOP], torch.device("cpu"))
        engine = Script([RIGHT])
        evaluation.add(engine, PromptBatch([prompt(5)], [0]), 1, lambda finished: None)
        evaluation.finish(tmp_path, 0, 0)
        asked.append(engine.keys)
        assert engine.temperatures == {0.3}
    assert asked[0] == asked[1]


@pytest.mark.parametrize("config", [{"samples": 0}, {"samples": 2, "k": [3]}, {"samples": 2, "k": [0]}])
def test_settings_that_cannot_be_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.(samples|k)"):
        EvaluationConfig(**config)
