"""What an online iteration is logged as: TRL's GRPO tags, over all ranks, masked and counted."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_posttrain.rewards.base import RewardFunction
from lit_posttrain.rewards.callables import PythonReward
from lit_posttrain.rollout.collect import Rollout
from lit_posttrain.sharding import all_reduce_sum, gather_objects
from lit_posttrain.types import MicroBatch, StepResult


def rollout_sums(
    batch: MicroBatch, log_probs: Tensor, old: Tensor, entropy: Tensor | None, first: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums and largest values over a micro-batch's tokens.

    Args:
        batch: The rows.
        log_probs: The trainer's, detached.
        old: The sampling policy's.
        entropy: Of each scored token.
        first: Whether the policy is still the one that sampled; only then does the engine have to agree with it.
    """
    mask = batch.mask
    sums = {"scored_fraction": mask.sum().float()}
    extremes: dict[str, Tensor] = {}
    change = (log_probs - old).where(mask, 0.0)
    moved = change.exp()
    sums["policy/approxkl_avg"] = change.square().sum() / 2
    sums["val/ratio"] = moved.where(mask, 0.0).sum()
    sums["val/ratio_square"] = moved.square().where(mask, 0.0).sum()
    if entropy is not None:
        sums["entropy"] = entropy.where(mask, 0.0).sum()
    if first:
        gap = (log_probs - batch.columns["engine_log_probs"]).where(mask, 0.0)
        ratio = gap.exp()
        sums["sampling/sampling_logp_difference/mean"] = gap.abs().sum()
        sums["sampling/importance_sampling_ratio/mean"] = ratio.where(mask, 0.0).sum()
        extremes["sampling/sampling_logp_difference/max"] = gap.abs().amax()
        extremes["sampling/importance_sampling_ratio/max"] = ratio.where(mask, 0.0).amax()
        extremes["sampling/importance_sampling_ratio/min"] = -ratio.where(mask, torch.inf).amin()
        sums["drawn/entropy"] = -log_probs.where(mask, 0.0).sum()
        if "ref_log_probs" in batch.columns:
            apart = (log_probs - batch.columns["ref_log_probs"]).where(mask, 0.0)
            sums["reference_gap"], sums["drawn/kl"] = apart.abs().sum(), apart.sum()
    return sums, extremes


def rollout_metrics(
    rollout: Rollout, group_size: int, results: Sequence[StepResult], device: torch.device
) -> dict[str, float]:
    """Tags without their ``train/`` prefix."""
    return {**_samples(rollout, group_size), **_updates(results)}


def _samples(rollout: Rollout, group_size: int) -> dict[str, float]:
    judgement = rollout.judgement
    mine = {
        "rewards": judgement.rewards.tolist(),
        "valid": judgement.valid.tolist(),
        "scores": judgement.scores.tolist(),
        "reasons": judgement.reasons,
        "lengths": [len(c.token_ids) for c in rollout.completions],
        "stopped": [c.stop_reason == "stop" for c in rollout.completions],
        "tokens": int(rollout.sequences.lengths.sum()),
    }
    ranks = gather_objects(mine)
    rewards = torch.tensor([r for rank in ranks for r in rank["rewards"]], dtype=torch.float64)
    valid = torch.tensor([v for rank in ranks for v in rank["valid"]], dtype=torch.bool)
    lengths = torch.tensor([n for rank in ranks for n in rank["lengths"]], dtype=torch.float64)
    stopped = torch.tensor([s for rank in ranks for s in rank["stopped"]], dtype=torch.bool)
    stds = [_std(r[v]) for r, v in zip(rewards.view(-1, group_size), valid.view(-1, group_size), strict=True)]
    metrics = {
        "reward": float(rewards[valid].mean()) if valid.any() else 0.0,
        "reward_std": sum(stds) / len(stds),
        "frac_reward_zero_std": sum(s == 0 for s in stds) / len(stds),
        "invalid_samples": float((~valid).sum()),
        "tokens_processed": float(sum(rank["tokens"] for rank in ranks)),
        **_lengths(lengths, stopped),
    }
    scores = torch.tensor([row for rank in ranks for row in rank["scores"]], dtype=torch.float64)
    for i, name in enumerate(judgement.names):
        given = scores[:, i][~scores[:, i].isnan()]
        if len(given):
            metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = float(given.mean()), _std(given)
        for reason, count in sum((Counter(rank["reasons"][i]) for rank in ranks), Counter()).items():
            metrics[f"rewards/{name}/reasons/{reason}"] = float(count)
    return metrics


def _lengths(lengths: Tensor, stopped: Tensor) -> dict[str, float]:
    metrics = {"completions/clipped_ratio": float((~stopped).double().mean())}
    for kind, values in (("", lengths), ("terminated_", lengths[stopped])):
        values = values if len(values) else torch.zeros(1)
        metrics[f"completions/mean_{kind}length"] = float(values.mean())
        metrics[f"completions/min_{kind}length"] = float(values.min())
        metrics[f"completions/max_{kind}length"] = float(values.max())
    return metrics


def _updates(results: Sequence[StepResult]) -> dict[str, float]:
    """Means over the iteration's updates; what only the first one measures is taken from it."""
    names = list(dict.fromkeys(name for r in results for name in r.metrics))
    metrics = {n: _mean([r.metrics[n] for r in results if n in r.metrics]) for n in names}
    for name in ("loss", "policy_loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        metrics.setdefault(name, 0.0)  # no row had anything to learn from, so none was computed
    fraction = results[0].metrics.get("scored_fraction", 0.0)
    overall = _mean([r.metrics.get("scored_fraction", 0.0) for r in results])
    firsts = ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
    for name in (*firsts, "entropy", "policy/approxkl_avg", "val/ratio", "val/ratio_square"):
        # Left-out rows are in the denominator but were never scored.
        if name in metrics and fraction > 0:
            metrics[name] /= fraction if name in firsts else overall
    if "val/ratio_square" in metrics:
        metrics["val/ratio_var"] = max(0.0, metrics.pop("val/ratio_square") - metrics["val/ratio"] ** 2)
    for name in ("reference_gap", "drawn/kl", "drawn/entropy"):
        metrics.pop(name, None)
    for name, value in results[0].extremes.items():
        if math.isfinite(value):  # else no token was scored on any rank
            metrics[name] = -value if name.endswith("/min") else value
    for name, pick in (("low", min), ("high", max)):
        values = [r.metrics[f"clip_ratio/{name}_mean"] for r in results if f"clip_ratio/{name}_mean" in r.metrics]
        metrics[f"clip_ratio/{name}_{pick.__name__}"] = pick(values, default=0.0)
    metrics["grad_norm"] = _mean([r.grad_norm for r in results if r.applied])
    metrics["skipped_updates"] = float(sum(not r.applied for r in results))
    return metrics


def per_answer(rollout: Rollout, values: Tensor | None, mean: float | None, device: torch.device) -> float | None:
    """Mean over answers of a sum over their tokens. Collective; None where neither is known.

    Args:
        rollout: This rank's.
        values: The tokens'.
        mean: Over all tokens of the iteration; read where ``values`` is None.
        device: Of the collective.
    """
    mask = rollout.mask
    own = 0.0 if values is None else float(values.where(mask, 0.0).sum())
    tokens, answers, total = all_reduce_sum([int(mask.sum()), int(mask.any(-1).sum()), own], device)
    if values is None and mean is None:
        return None
    return (total if mean is None or values is not None else mean * tokens) / max(answers, 1.0)


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor, device: torch.device) -> float:
    """1 - mean((R - V)^2) / var(R) over all ranks' tokens; 0 where the returns differ by rounding alone. Collective."""
    returns, values = (x.double().where(mask, 0.0) for x in (returns, values))
    sums = [int(mask.sum()), float(returns.sum()), float((returns.square() + values.square()).sum())]
    tokens, total, squares = all_reduce_sum(sums, device)
    # About the mean in a second pass: a difference of squares would be rounding where the returns are nearly equal.
    centred = (returns - total / max(tokens, 1.0)).where(mask, 0.0)
    spread, error = all_reduce_sum([float(centred.square().sum()), float((returns - values).square().sum())], device)
    # fp32 returns are values plus advantages: their rounding is relative to both.
    return 1.0 - error / spread if spread > 1e-10 * squares + 1e-16 * tokens else 0.0


def reported(rewards: Sequence[RewardFunction]) -> dict[str, float]:
    """Means over all ranks of what reward functions logged by themselves since the last call."""
    mine = [logs for f in rewards if isinstance(f, PythonReward) for logs in f.pop_logs()[0].items()]
    values: dict[str, list[float]] = {}
    for name, value in (pair for rank in gather_objects(mine) for pair in rank):
        values.setdefault(name, []).append(value)
    return {name: _mean(each) for name, each in values.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _std(values: Tensor) -> float:
    """Sample standard deviation like the peer's tag; exactly 0 where all values are equal."""
    if len(values) < 2 or bool((values == values[0]).all()):
        return 0.0
    return float(values.std())
