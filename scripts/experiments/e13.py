"""E13: where PPO's KL stands and which estimator it has decide what is converged to, at one coefficient."""

from pathlib import Path
from typing import Any

import torch
from tabular_policy import (  # pyright: ignore[reportMissingImports]: tests/ is on reproduce.py's path
    MASK,
    REWARDS,
    STATES,
    THETA_REF,
    answer_log_probs,
    log_probs,
)
from torch import Tensor

from lit_posttrain.functional.masked import Totals
from lit_posttrain.functional.returns import generalised_advantages, token_rewards
from lit_posttrain.objective import KLConfig, RatioConfig
from lit_posttrain.ppo_objective import GAEConfig, PPOObjective, ValueConfig

CLAIM = (
    "At the same coefficient .5, PPO with k1 in the reward converges to pi_ref exp(r / beta) / Z, the optimum of "
    "E[r] - beta KL(pi || pi_ref); k2 in the loss stays just below it, and k3 in the loss, whose gradient is that of "
    "KL(pi_ref || pi), clearly below."
)
CRITERION = (
    "every seed's J is within .01 of 1.1080 (k1 in the reward), 1.1038 (k2 in the loss) and 1.0661 (k3 in the loss), "
    "its E[r] within .05 of 1.7073, 1.7200 and 1.6041, and k1's J is the highest"
)
SEEDS = [0, 1, 2, 3, 4]

BETA, ANSWERS, STEPS, LR = 0.5, 2048, 1500, 1.0
# J and E[r] of the fixed points, from the gradient's exact expectation.
FIXED = {
    "k1_reward": (1.108014, 1.707256),
    "k2_loss": (1.103839, 1.720049),
    "k3_loss": (1.066083, 1.604093),
}


def objective(name: str) -> PPOObjective:
    """PPO without whitening or clipping in reach; an answer's terms are summed, so that the gradient is J's."""
    estimator, placement = name.split("_")
    return PPOObjective(
        ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
        kl=KLConfig(estimator=estimator, placement=placement, coef=BETA),  # type: ignore[arg-type]
        aggregation="constant",
        constant_length=1,
        gae=GAEConfig(gamma=1.0, lam=1.0, whiten_advantages=False, whiten_rewards=False),
        value=ValueConfig(coef=1.0, clip=0.2),
    )


def step_loss(o: PPOObjective, theta: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's loss on sampled answers, and the returns that a critic learns from."""
    own, ref, mask = log_probs(theta)[rows], log_probs(THETA_REF)[rows], MASK[rows]
    in_reward = o.kl.placement == "reward"
    rewards = token_rewards(REWARDS[rows], own.detach(), ref if in_reward else None, mask, o.kl.coef)
    credit = generalised_advantages(rewards, values[STATES][rows], mask, o.gae.gamma, o.gae.lam)
    totals = Totals(float(len(rows)), float(mask.sum()))
    return o.policy_loss(own, own.detach(), ref, credit.advantages, mask, totals).loss, credit.returns


def train(name: str, seed: int, steps: int) -> Tensor:
    """SGD with a rate that falls to 0; the critic is a table of running means of each state's returns."""
    o, generator = objective(name), torch.Generator().manual_seed(seed)
    theta = THETA_REF.clone().requires_grad_()
    values = torch.zeros(7, dtype=torch.float64)
    for step in range(steps):
        probabilities = answer_log_probs(theta).detach().exp()
        rows = torch.multinomial(probabilities, ANSWERS, replacement=True, generator=generator)
        loss, returns = step_loss(o, theta, values, rows)
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= LR * (1 - step / steps) * gradient
        states, mask = STATES[rows], MASK[rows]
        seen = torch.bincount(states[mask], minlength=7)
        means = torch.zeros(7, dtype=torch.float64).index_add_(0, states[mask], returns[mask]) / seen.clamp(min=1)
        values = torch.where(seen > 0, 0.8 * values + 0.2 * means, values)
    return theta.detach()


def figures_of(theta: Tensor) -> tuple[float, float]:
    """J and E[r], summed over all answers."""
    own, ref = answer_log_probs(theta), answer_log_probs(THETA_REF)
    p = own.exp()
    expected = float((p * REWARDS).sum())
    return expected - BETA * float((p * (own - ref)).sum()), expected


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Train each variant for each seed; quick stops after 50 steps."""
    out = []
    for seed in seeds:
        figures: dict[str, Any] = {"seed": seed}
        for name in FIXED:
            j, expected = figures_of(train(name, seed, 50 if quick else STEPS))
            figures |= {f"J_{name}": j, f"reward_{name}": expected}
        out.append(figures)
    return out


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """J of every seed beside the fixed points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for i, (name, (j, _)) in enumerate(FIXED.items()):
        axes.hlines(j, i - 0.3, i + 0.3, color="black", label="" if i else "fixed point")
        axes.plot([i] * len(figures), [f[f"J_{name}"] for f in figures], "o", alpha=0.6, label="" if i else "a seed")
    axes.set_xticks(range(len(FIXED)), ["k1 in the reward", "k2 in the loss", "k3 in the loss"])
    axes.set_ylabel("E[r] - beta KL")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        abs(f[f"J_{name}"] - j) < 0.01
        and abs(f[f"reward_{name}"] - reward) < 0.05
        and f["J_k1_reward"] >= f[f"J_{name}"]
        for f in figures
        for name, (j, reward) in FIXED.items()
    )
