"""What an iteration is logged as, against numbers worked out by hand."""

import math

import pytest
import torch

from lit_posttrain.algorithms.measures import explained_variance, rollout_metrics, rollout_sums
from lit_posttrain.batching import pad_sequences
from lit_posttrain.rewards.base import Judgement
from lit_posttrain.rollout.collect import Rollout
from lit_posttrain.types import Completion, MicroBatch, Prompt, Sample, StepResult, Verdict

CPU = torch.device("cpu")


def rollout() -> Rollout:
    """Two prompts of two samples: rewards 1, 0 and .7, .7; the last sample is invalid."""
    prompts = [Prompt(i, "q", "q", [5] * (i + 2), "", "a", {}) for i in range(2)]
    lengths, stopped = [3, 5, 2, 4], [True, False, True, True]
    drawn = [
        Completion(list(range(n)), [-1.0] * n, "stop" if s else "length", 1)
        for n, s in zip(lengths, stopped, strict=True)
    ]
    samples = [Sample("q", "c", c.token_ids, c.stop_reason, "a", {}) for c in drawn]
    scores = torch.tensor([[1.0, math.nan], [0.0, 0.5], [0.7, 0.5], [math.nan, 0.0]])
    valid = torch.tensor([True, True, True, False])
    verdicts = [[Verdict(0.0)] * 2] * 4
    judgement = Judgement(
        ["right", "form"], scores, torch.tensor([1.0, 0.0, 0.7, 0.0]), valid, [{"lost": 1}, {}], verdicts
    )
    sequences = pad_sequences([p.token_ids for p in prompts for _ in range(2)], [c.token_ids for c in drawn])
    mask = sequences.completion_mask() & valid[:, None]
    return Rollout(prompts, drawn, samples, judgement, sequences, mask, torch.zeros(mask.shape), [0, 1, 2, 3])


def result(**metrics: float) -> StepResult:
    return StepResult({"scored_fraction": 1.0, **metrics}, {}, 2.0, True)


def test_samples_are_counted_over_the_valid_ones() -> None:
    metrics = rollout_metrics(rollout(), 2, [result(loss=0.5)], CPU)
    expected = {
        "reward": 1.7 / 3,
        "reward_std": (math.sqrt(0.5) + 0.0) / 2,  # ddof 1; a group of one valid sample has none
        "frac_reward_zero_std": 0.5,
        "invalid_samples": 1.0,
        "rewards/right/mean": 1.7 / 3,
        "rewards/form/mean": 1.0 / 3,
        "rewards/right/reasons/lost": 1.0,
        "completions/mean_length": 3.5,
        "completions/min_length": 2.0,
        "completions/max_length": 5.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 3.0,
        "completions/max_terminated_length": 4.0,
        "tokens_processed": 3 + 5 + 2 + 4 + 2 * 2 + 2 * 3,
        "loss": 0.5,
        "grad_norm": 2.0,
        "skipped_updates": 0.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.trap(18)
def test_equal_rewards_that_floats_cannot_hold_have_no_spread() -> None:
    r = rollout()
    same = r.judgement._replace(rewards=torch.full((4,), 0.7), valid=torch.ones(4, dtype=torch.bool))
    metrics = rollout_metrics(r._replace(judgement=same), 2, [result()], CPU)
    assert metrics["reward_std"] == 0.0
    assert metrics["frac_reward_zero_std"] == 1.0


def test_what_was_left_out_does_not_thin_the_means_of_scored_tokens() -> None:
    half = StepResult(
        {"scored_fraction": 0.5, "entropy": 0.2, "sampling/sampling_logp_difference/mean": 0.01, "kl": 0.3},
        {"sampling/importance_sampling_ratio/min": -0.9}, 1.0, True,
    )  # fmt: skip
    metrics = rollout_metrics(rollout(), 2, [half], CPU)
    assert metrics["entropy"] == pytest.approx(0.4)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.02)
    assert metrics["kl"] == pytest.approx(0.3)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(0.9)


def test_mismatch_and_entropy_of_masked_tokens_alone() -> None:
    sequences = pad_sequences([[5, 6]] * 2, [[7, 8], [9]])
    mask = sequences.completion_mask()
    log_probs = torch.tensor([[9.0, -1.0, -2.0], [9.0, -0.5, 9.0]])
    engine = torch.tensor([[0.0, -1.2, -1.5], [0.0, -0.5, 0.0]])
    entropy = torch.tensor([[9.0, 0.1, 0.2], [9.0, 0.3, 9.0]])
    batch = MicroBatch(sequences, mask, {"engine_log_probs": engine}, torch.arange(2))
    sums, extremes = rollout_sums(batch, log_probs, log_probs, entropy, first=True)
    assert float(sums["scored_fraction"]) == 3
    assert float(sums["entropy"]) == pytest.approx(0.6)
    assert float(sums["sampling/sampling_logp_difference/mean"]) == pytest.approx(0.7)
    ratios = [math.exp(0.2), math.exp(-0.5), 1.0]
    assert float(sums["sampling/importance_sampling_ratio/mean"]) == pytest.approx(sum(ratios))
    assert float(extremes["sampling/sampling_logp_difference/max"]) == pytest.approx(0.5)
    assert float(extremes["sampling/importance_sampling_ratio/max"]) == pytest.approx(max(ratios))
    assert -float(extremes["sampling/importance_sampling_ratio/min"]) == pytest.approx(min(ratios))
    raised = rollout_sums(
        batch._replace(columns={"engine_log_probs": engine - 2}), log_probs, log_probs, entropy, first=True
    )[1]
    assert -float(raised["sampling/importance_sampling_ratio/min"]) == pytest.approx(min(ratios) * math.exp(2))
    later, nothing = rollout_sums(batch, log_probs, log_probs, entropy, first=False)
    assert set(later) == {"scored_fraction", "entropy", "policy/approxkl_avg", "val/ratio", "val/ratio_square"}
    assert nothing == {}


def test_explained_variance_of_returns_that_are_far_from_zero() -> None:
    mask = torch.tensor([[True, True, False], [True, True, False]])
    returns = torch.tensor([[1000.0, 1001.0, math.nan], [1002.0, 1003.0, 7.0]])
    values = returns + torch.tensor([[0.5, -0.5, 1.0], [0.5, -0.5, math.nan]])
    assert explained_variance(returns, values, mask, CPU) == pytest.approx(1 - 0.25 / 1.25)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e4, 1e-6])
def test_returns_that_differ_by_rounding_alone_have_no_variance_to_explain(constant: float) -> None:
    values = torch.linspace(-1.0, 1.0, 90).view(3, 30)
    returns = (constant - values) + values  # in fp32
    assert explained_variance(returns, values, torch.ones(3, 30, dtype=torch.bool), CPU) == 0.0
