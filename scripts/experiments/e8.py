"""E8: dividing by the group's standard deviation weighs prompts by difficulty (Dr. GRPO, 2503.20783, section 3.1)."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_posttrain.functional.masked import Totals
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, RatioConfig

CLAIM = (
    "With success probability p, GRPO's expected gradient is w(p) grad p and Dr. GRPO's (1 - 1/G) grad p, where "
    "w(p) = E_k[sqrt(k/G (1 - k/G))] / (p (1 - p)), k ~ Bin(G, p): the standard deviation favours very easy and very "
    "hard prompts."
)
CRITERION = "GRPO's gradient norm over Dr. GRPO's is w(p) G / (G - 1) within 5% at each p, for every seed"
SEEDS = [0, 1, 2, 3, 4]

PROBABILITIES = [0.05, 0.125, 0.25, 0.5, 0.75, 0.95]
GROUP_SIZE, GROUPS = 8, 4000


def predicted(p: float, group_size: int = GROUP_SIZE) -> float:
    """w(p) G / (G - 1), by summing over the binomial distribution."""
    spread = sum(
        math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) * math.sqrt(k / group_size * (1 - k / group_size))
        for k in range(group_size + 1)
    )
    return spread / (p * (1 - p)) * group_size / (group_size - 1)


def gradient(scale: str, logit: Tensor, right: Tensor) -> float:
    """D loss / d logit of one prompt: the answer is one token, right with probability sigmoid(logit)."""
    objective = Objective(
        advantage=AdvantageConfig(baseline="group_mean", scale=scale),  # type: ignore[arg-type]
        ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
        kl=KLConfig(estimator="k3", placement="loss", coef=0.0),
        aggregation="sequence_mean",
    )
    logit = logit.clone().requires_grad_()
    log_probs = torch.nn.functional.logsigmoid(torch.where(right, logit, -logit))[:, None]
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    credit = objective.advantages(right.double(), mask[:, 0], GROUP_SIZE)[:, None]
    totals = Totals(float(len(right)), float(len(right)))
    objective.policy_loss(log_probs, log_probs.detach(), None, credit, mask, totals).loss.backward()
    assert logit.grad is not None
    return logit.grad.item()


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Measure the ratio at each success probability on the same sampled groups; quick draws a tenth of them."""
    groups = GROUPS // 10 if quick else GROUPS
    out = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        figures: dict[str, Any] = {"seed": seed}
        for p in PROBABILITIES:
            right = torch.rand(groups * GROUP_SIZE, generator=generator) < p
            logit = torch.tensor(p, dtype=torch.float64).logit()
            grpo, dr_grpo = (abs(gradient(scale, logit, right)) for scale in ("group_std", "none"))
            figures[f"ratio_{p}"] = grpo / dr_grpo
        out.append(figures)
    return out


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(abs(f[f"ratio_{p}"] / predicted(p) - 1) < 0.05 for f in figures for p in PROBABILITIES)
