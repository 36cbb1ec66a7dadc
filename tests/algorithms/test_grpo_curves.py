"""GRPO end to end on the tiny model: what it logs, and how it evaluates."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import (
    BATCH,
    GROUP,
    Failing,
    curve,
    even,
    fit,
    grpo,
    objective,
    prompts,
    scalars,
    trainer,
)

from lit_posttrain.algorithms.evaluation import EvaluationConfig
from lit_posttrain.rewards import ExactAnswer, Verifier
from lit_posttrain.types import Sample

ROWS = BATCH * GROUP


# --- what is logged -------------------------------------------------------------------------------------------------

ALWAYS = re.findall(
    r"\S+",
    """
loss grad_norm learning_rate epoch num_tokens step_time reward reward_std frac_reward_zero_std rewards/even/mean
rewards/even/std entropy clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max
clip_ratio/region_mean completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length
sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max sampling/importance_sampling_ratio/min
sampling/importance_sampling_ratio/mean sampling/importance_sampling_ratio/max
""",
)


@pytest.mark.parametrize("logged", [True, False])
def test_entropy_is_computed_where_a_logger_reads_it(tiny_model: Path, tmp_path: Path, logged: bool) -> None:
    asked: list[bool] = []
    module = grpo(tiny_model)

    def watch(trainer: Any, module: Any) -> None:
        real = module.built_policy().forward
        module.built_policy().forward = lambda *a, with_entropy=False, **k: (
            asked.append(with_entropy) or real(*a, with_entropy=with_entropy, **k)
        )

    module.on_train_start = lambda: (type(module).on_train_start(module), watch(None, module))[0]  # type: ignore
    fit(module, prompts(tiny_model, tmp_path), tmp_path, **({} if logged else {"logger": False}))
    assert asked  # also by the engine, which compares itself with the policy
    assert (True in asked) == logged


def test_every_tag_of_the_peer_is_there_at_the_right_iterations(tiny_model: Path, tmp_path: Path) -> None:
    kept: list[Any] = []
    module = grpo(tiny_model, objective=objective(kl=0.1), log_samples_every=2)
    real = module.collect
    module.collect = lambda *a: kept.append(real(*a)) or kept[-1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    values = scalars(tmp_path)
    for tag in (*ALWAYS, "kl"):
        assert [step for step, _ in values[f"train/{tag}"]] == [1, 2, 3], tag
    lengths = torch.tensor([[float(len(c.token_ids)) for c in r.completions] for r in kept])
    assert curve(tmp_path, "train/completions/mean_length") == pytest.approx(lengths.mean(1).tolist())
    assert curve(tmp_path, "train/completions/max_length") == lengths.amax(1).tolist()
    rewards = torch.tensor([even([c.token_ids for c in r.completions]) for r in kept])
    assert curve(tmp_path, "train/reward") == pytest.approx(rewards.mean(1).tolist())
    stds = rewards.view(3, BATCH, GROUP).std(-1).mean(1)
    assert curve(tmp_path, "train/reward_std") == pytest.approx(stds.tolist(), rel=1e-4)
    tokens = torch.tensor([float(r.sequences.lengths.sum()) for r in kept]).cumsum(0)
    assert curve(tmp_path, "train/num_tokens") == tokens.tolist()
    per_epoch = tiny_runs.QUESTIONS // BATCH
    assert curve(tmp_path, "train/epoch") == pytest.approx([(i + 1) / per_epoch for i in range(3)])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "version_0"))
    events.Reload()
    assert [e.step for e in events.Tensors("train/samples/text_summary")] == [1, 2]


def test_what_has_no_meaning_is_not_logged(tiny_model: Path, tmp_path: Path) -> None:
    """No KL without a reference; reasons only where there are any; a function that scored nothing has no mean."""

    def seldom(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
        log_metric("tries", 3.0)
        return [None] * len(completions)

    from lit_posttrain.rewards import PythonReward

    fit(grpo(tiny_model, [PythonReward(even), PythonReward(seldom)]), prompts(tiny_model, tmp_path), tmp_path)
    tags = scalars(tmp_path)
    assert not any("kl" in tag.split("/") for tag in tags)
    assert "train/rewards/seldom/mean" not in tags
    assert "train/rewards/even/mean" in tags
    assert tags["train/rewards/seldom/reasons/not_applicable"] == [(1, ROWS), (2, ROWS)]
    assert tags["train/tries"] == [(1, 3.0), (2, 3.0)]  # what the function itself logs


# --- evaluation -----------------------------------------------------------------------------------------------------


class LastToken(Verifier):
    """Right where the last token's id is 0 modulo 3; its vote is that number."""

    def extract(self, sample: Sample) -> str | None:
        number = sample.token_ids[-1] % 4
        return None if number == 3 else str(number)

    def score(self, sample: Sample) -> float:
        return float(self.extract(sample) == "0")


def evaluated(model: Path, folder: Path, **overrides: Any) -> Any:
    module = grpo(
        model, [LastToken(name="last"), Failing(lambda s: False)], evaluation=EvaluationConfig(samples=4, k=[1, 2, 4])
    )
    data = prompts(model, folder, held_out_percent=50, val_size=5, val_batch_size=2, batch_size=2)
    run = trainer(folder, limit_val_batches=None, val_check_interval=2, check_val_every_n_epoch=None, **overrides)
    return run, module, data


def recomputed(path: Path) -> dict[str, float]:
    """pass@k, maj@k and means from the file alone, by enumeration."""
    from itertools import combinations

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups: dict[int, list[Any]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    assert {tuple(r["sample"] for r in g) for g in groups.values()} == {(0, 1, 2, 3)}
    values: dict[str, list[float]] = {}
    for group in groups.values():
        for k in (1, 2, 4):
            tries = [any(r["correct"] for r in some) for some in combinations(group, k)]
            values.setdefault(f"pass@{k}", []).append(sum(tries) / len(tries))
        votes = [r["vote"] for r in group if r["vote"] is not None]
        winners = [v for v in set(votes) if votes.count(v) == max(map(votes.count, votes))]
        values.setdefault("maj@4", []).append(winners.count("0") / len(winners) if winners else 0.0)
    flat = {
        "completions/mean_length": [r["tokens"] for r in rows],
        "completions/clipped_ratio": [r["stop_reason"] == "length" for r in rows],
        "rewards/last/mean": [r["rewards"]["last"] for r in rows],
        "rewards/failing/mean": [r["rewards"]["failing"] for r in rows],
    }
    return {name: sum(v) / len(v) for name, v in {**values, **flat}.items()}


@pytest.mark.trap(41)
def test_logged_evaluation_is_what_its_file_says(tiny_model: Path, tmp_path: Path) -> None:
    run, module, data = evaluated(tiny_model, tmp_path, max_steps=2)
    run.fit(module, data)
    expected = recomputed(tmp_path / "version_0/evaluation/step-2.jsonl")
    assert 0 < expected["pass@1"] < expected["pass@4"]
    logged = scalars(tmp_path)
    for name, value in expected.items():
        assert logged[f"eval/{name}"] == [(2, pytest.approx(value, abs=1e-6))], name


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_alone_equals_the_one_within_training(tiny_model: Path, tmp_path: Path, command: str) -> None:
    run, module, data = evaluated(tiny_model, tmp_path, max_steps=2)
    (out,) = getattr(run, command)(module, data)
    assert out.pop("step") == 0
    prefix = "eval" if command == "validate" else "test"
    expected = recomputed(tmp_path / "version_0/evaluation/step-0.jsonl")
    assert out == {f"{prefix}/{name}": pytest.approx(v, abs=1e-6) for name, v in {**expected, "invalid": 0.0}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, module, data = evaluated(tiny_model, tmp_path / "again", max_steps=2)
        getattr(run, command)(module, data)
    files = [p / "version_0/evaluation/step-0.jsonl" for p in (tmp_path, tmp_path / "again")]
    assert files[0].read_text() == files[1].read_text()


def test_evaluation_of_a_checkpoint_is_named_after_its_iteration(tiny_model: Path, tmp_path: Path) -> None:
    from lit_posttrain.callbacks import CheckpointEvery
    from lit_posttrain.checkpoint import newest_checkpoint

    run, module, data = evaluated(tiny_model, tmp_path, max_steps=2)
    run.callbacks.append(CheckpointEvery(2))
    run.fit(module, data)
    found = newest_checkpoint(tmp_path / "version_0")
    assert found is not None
    run, module, data = evaluated(tiny_model, tmp_path / "alone")
    (out,) = run.validate(module, data, ckpt_path=found.state)
    assert out["step"] == 2
    files = [p / "version_0/evaluation/step-2.jsonl" for p in (tmp_path, tmp_path / "alone")]
    assert files[0].read_text() == files[1].read_text()


def test_predict_writes_every_training_prompt(tiny_model: Path, tmp_path: Path) -> None:
    run, module, data = evaluated(tiny_model, tmp_path)
    run.predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "version_0/predictions/step-0.jsonl").read_text().splitlines()]
    assert [r["question"] for r in rows] == [p.question for p in data.prompts("train") for _ in range(4)]
    assert all(set(r["rewards"]) == {"last", "failing"} and r["completion"] for r in rows)


def test_evaluation_at_temperature_zero_is_greedy(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = grpo(tiny_model, [ExactAnswer()], evaluation=EvaluationConfig(samples=2, temperature=0.0))
    data = prompts(tiny_model, tmp_path, held_out_percent=50, val_size=2)
    trainer(tmp_path, limit_val_batches=None).validate(module, data, verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "version_0/evaluation/step-0.jsonl").read_text().splitlines()]
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = module.tokenizer
    for i, prompt in enumerate(data.prompts("val")):
        ids = torch.tensor([prompt.token_ids])
        out = network.generate(ids, max_new_tokens=tiny_runs.NEW_TOKENS, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1] :]).removesuffix("<|im_end|>")
        assert rows[2 * i]["completion"] == rows[2 * i + 1]["completion"] == text
