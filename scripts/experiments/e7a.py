"""E7a: dividing an answer's loss by its own length makes wrong answers long (Dr. GRPO, 2503.20783, section 3)."""

from typing import Any

import torch
from torch import Tensor

from lit_posttrain.functional.masked import Totals
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, RatioConfig

CLAIM = (
    "GRPO's 1/|o| lengthens wrong answers and shortens right ones although no reward depends on length; "
    "Dr. GRPO's constant divisor moves neither."
)
CRITERION = (
    "after 200 steps every seed's expected length is 58.3 +- 1 (wrong) and 1.02 +- .05 (right) under GRPO, and "
    "10.1 +- 1 for both under Dr. GRPO"
)
SEEDS = [0, 1, 2, 3, 4]

GROUPS, GROUP_SIZE, LIMIT, STEPS, STOP = 32, 8, 64, 200, 0.1

GRPO = Objective(
    advantage=AdvantageConfig(baseline="group_mean", scale="group_std"),
    ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
    kl=KLConfig(estimator="k3", placement="loss", coef=0.0),
    aggregation="sequence_mean",
)
DR_GRPO = Objective(
    advantage=AdvantageConfig(baseline="group_mean", scale="none"),
    ratio=GRPO.ratio,
    kl=GRPO.kl,
    aggregation="constant",
    constant_length=LIMIT,
)


def expected_length(stop_logits: Tensor) -> Tensor:
    """Mean tokens of an answer that stops with this probability after each, and is cut at LIMIT."""
    stop = stop_logits.sigmoid()
    return (1 - (1 - stop) ** LIMIT) / stop


def step_loss(objective: Objective, stop_logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample answers and score them: half of each group is told by the environment to be wrong, half to be right.

    Column 0 is the mode token, which the environment wrote: it is masked out of the loss. Each further token is "go
    on", and the last one "stop" unless the answer was cut.
    """
    rows = GROUPS * GROUP_SIZE
    right = torch.arange(rows) % 2
    logits = stop_logits[right]
    uniform = torch.rand(rows, LIMIT, generator=generator, dtype=torch.float64)
    stops = uniform < logits.detach().sigmoid()[:, None]
    before = stops.long().cumsum(1) - stops.long()
    completion = before == 0
    mode = torch.zeros(rows, 1, dtype=torch.bool)
    mask = torch.cat([mode, completion], 1)
    sign = torch.where(torch.cat([mode, stops], 1), 1.0, -1.0)
    log_probs = torch.nn.functional.logsigmoid(sign * logits[:, None])
    advantages = objective.advantages(right.double(), torch.ones(rows, dtype=torch.bool), GROUP_SIZE)
    totals = Totals(float(rows), float(mask.sum()))
    credit = advantages[:, None].expand_as(log_probs)
    return objective.policy_loss(log_probs, log_probs.detach(), None, credit, mask, totals).loss


def train(objective: Objective, lr: float, seed: int, steps: int) -> list[float]:
    """Expected lengths (wrong, right) after ``steps`` of SGD from a stop probability of .1 in both modes."""
    generator = torch.Generator().manual_seed(seed)
    stop_logits = torch.full((2,), STOP, dtype=torch.float64).logit().requires_grad_()
    optimizer = torch.optim.SGD([stop_logits], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        step_loss(objective, stop_logits, generator).backward()
        optimizer.step()
    return expected_length(stop_logits.detach()).tolist()


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Train both objectives for each seed; quick stops after 20 steps, when the lengths have only begun to part."""
    steps = 20 if quick else STEPS
    out = []
    for seed in seeds:
        grpo_wrong, grpo_right = train(GRPO, 1.0, seed, steps)
        # The constant divides by LIMIT where the answers' mean length is 10: the same step size after this factor.
        dr_wrong, dr_right = train(DR_GRPO, LIMIT / 10, seed, steps)
        figures = {"grpo_wrong": grpo_wrong, "grpo_right": grpo_right, "dr_wrong": dr_wrong, "dr_right": dr_right}
        out.append({"seed": seed, **figures})
    return out


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        abs(f["grpo_wrong"] - 58.3) < 1
        and abs(f["grpo_right"] - 1.02) < 0.05
        and abs(f["dr_wrong"] - 10.1) < 1
        and abs(f["dr_right"] - 10.1) < 1
        for f in figures
    )
