"""Credit from the rewards of one group: several answers to the same prompt."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["group_std", "group_sample_std", "none"]


def group_advantages(
    rewards: Float[Tensor, " b"],
    valid: Bool[Tensor, " b"],
    group_size: int,
    baseline: Baseline,
    scale: Scale,
    eps: float = 0.0,
) -> Float[Tensor, " b"]:
    """A_i = (r_i - baseline_i) / (std + eps) within each group (GRPO, 2402.03300 section 4.1.2).

    ``group_mean`` with ``none`` is Dr. GRPO (2503.20783); ``leave_one_out`` is RLOO (2402.14740), which is G / (G - 1)
    times that. The papers do not say which standard deviation they mean: ``group_std`` is the population's (ddof 0),
    ``group_sample_std`` the sample's (ddof 1).

    A group whose valid rewards are all equal gets exactly 0, decided by max == min: rounding makes the standard
    deviation of ``[0.7] * 8`` in float32 a tiny positive number, and an epsilon then turns noise into advantages of
    order 1. A group with fewer than two valid members gets 0 too. (``none`` with ``none`` uses nothing of the group,
    and gives the rewards themselves.)

    Args:
        rewards: Rows ``i * group_size .. (i + 1) * group_size`` are one group.
        valid: False where the reward is unknown; such a row gets 0 and leaves its group's mean and std.
        group_size: Samples a prompt, G.
        baseline: What is subtracted: the mean of the group, the mean of the *other* members, or nothing.
        scale: What it is divided by.
        eps: Added to the standard deviation (0 here; other implementations use 1e-4).

    Returns:
        Detached advantages in the dtype of ``rewards``; computed in float64.

    Raises:
        ValueError: The rows are not whole groups, or a valid reward is not finite.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"group_size: {len(rewards)} rows are not whole groups of {group_size}; keep groups together")
    r = rewards.detach().double().view(-1, group_size)
    v = valid.view(-1, group_size)
    if not r[v].isfinite().all():
        raise ValueError("rewards: a valid reward is nan or infinite; mark the row invalid if it could not be scored")
    r = r.where(v, 0.0)
    n = v.sum(1, keepdim=True)
    mean = r.sum(1, keepdim=True) / n.clamp(min=1)
    if baseline == "group_mean":
        advantages = r - mean
    elif baseline == "leave_one_out":
        advantages = (r - mean) * n / (n - 1).clamp(min=1)  # = r_i - mean of the others
    elif baseline == "none":
        advantages = r
    else:
        raise ValueError(f"baseline: {baseline!r} is none of 'group_mean', 'leave_one_out', 'none'")

    spread = r.where(v, -torch.inf).amax(1, keepdim=True) != r.where(v, torch.inf).amin(1, keepdim=True)
    informative = spread & (n >= 2)
    if scale in ("group_std", "group_sample_std"):
        ddof = 1 if scale == "group_sample_std" else 0
        variance = (r - mean).where(v, 0.0).square().sum(1, keepdim=True) / (n - ddof).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps).where(informative, 1.0)
    elif scale != "none":
        raise ValueError(f"scale: {scale!r} is none of 'group_std', 'group_sample_std', 'none'")
    if (baseline, scale) != ("none", "none"):
        advantages = advantages.where(informative, 0.0)
    return advantages.where(v, 0.0).view(-1).to(rewards.dtype)
