"""E0: on a language model small enough to enumerate, the production objective has the exact gradients and optima."""

import itertools
from typing import Any

import numpy as np
import tabular_policy as policy  # pyright: ignore[reportMissingImports]: tests/ is on reproduce.py's path
import torch
from oracles import tabular  # pyright: ignore[reportMissingImports]

CLAIM = (
    "The policy-gradient objectives have the expected gradients that enumeration gives, converge to the optima known "
    "in closed form, and only KL (k1) in the reward converges to pi_ref exp(r / beta) / Z."
)
CRITERION = (
    "for every seed: the expected gradient of all 162 combinations of credit, aggregation and KL is within 1e-6 of "
    "enumeration at a random policy, and each sampled run ends within .02 (J) and .05 (E[r]) of its known fixed point; "
    "the exact fixed points of k1 in the reward, k2 and k3 in the loss have J 1.108014, 1.103839, 1.066083 within 1e-5"
)
SEEDS = [0, 1, 2, 3, 4]

BETA = 0.5
BASELINES, SCALES = ("group_mean", "leave_one_out", "none"), ("group_std", "group_sample_std", "none")
AGGREGATIONS, ESTIMATORS = ("sequence_mean", "token_mean", "constant"), ("k1", "k2", "k3")
EXACT = {("k1", "reward"): 1.108014, ("k2", "loss"): 1.103839, ("k3", "loss"): 1.066083}
# name: (baseline, scale, aggregation, estimator, placement), group size, J and E[r] of the fixed point
SAMPLED: dict[str, tuple[tuple[str, str, str, str, str], int, float, float]] = {
    "rloo_k1_reward": (("leave_one_out", "none", "constant", "k1", "reward"), 4, 1.108014, 1.707256),
    "dr_grpo_k2": (("group_mean", "none", "constant", "k2", "loss"), 4, 1.0782, 1.4826),
    "dr_grpo_k3": (("group_mean", "none", "constant", "k3", "loss"), 4, 1.0432, 1.4091),
    "grpo_k3": (("group_mean", "group_sample_std", "sequence_mean", "k3", "loss"), 4, 1.0409, 1.5052),
    "grpo_constant_k3": (("group_mean", "group_sample_std", "constant", "k3", "loss"), 4, 1.0397, 1.5073),
    "grpo_no_std_k3": (("group_mean", "none", "sequence_mean", "k3", "loss"), 4, 1.0417, 1.4061),
    "dr_grpo_k2_g8": (("group_mean", "none", "constant", "k2", "loss"), 8, 1.098921, 1.611804),
    "dr_grpo_k3_g8": (("group_mean", "none", "constant", "k3", "loss"), 8, 1.060654, 1.514375),
}
STEPS, GROUPS, LR = 500, 64, 2.0


def gradient_error(seed: int, combinations: slice = slice(None)) -> float:
    """Largest deviation from enumeration over the 162 combinations, at a random policy, for groups of two."""
    noise = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theta = policy.THETA_REF + 0.7 * noise
    worst = 0.0
    choices = itertools.product(BASELINES, SCALES, AGGREGATIONS, ESTIMATORS, ("loss", "reward"))
    for baseline, scale, aggregation, estimator, placement in list(choices)[combinations]:
        o = policy.objective(baseline, scale, aggregation, estimator, placement, BETA)
        ours = policy.expected_loss_gradient(o, theta, 2)
        theirs = tabular.expected_loss_gradient(
            theta.numpy(),
            group=2,
            **{"baseline": baseline, "scale": scale, "aggregation": aggregation},
            **{"estimator": estimator, "placement": placement, "coef": BETA},
        )
        worst = max(worst, float(np.abs(ours.numpy() - theirs).max()))
    return worst


def exact_fixed_point(estimator: str, placement: str) -> float:
    """J where the expected gradient vanishes, in the limit of an infinite group."""
    o = policy.objective("none", "none", "constant", estimator, placement, BETA)
    return tabular.regularised_reward(policy.stationary_point(o, 1, policy.THETA_REF).numpy())


def sampled_run(settings: tuple[str, str, str, str, str], group: int, seed: int, steps: int) -> tuple[float, float]:
    """J and E[r] after on-policy SGD from the reference, the step size falling to 0."""
    o = policy.objective(*settings, BETA)
    generator = torch.Generator().manual_seed(seed)
    theta = policy.THETA_REF.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        probabilities = policy.answer_log_probs(theta.detach()).exp()
        members = torch.multinomial(probabilities, GROUPS * group, True, generator=generator).view(GROUPS, group)
        optimizer.zero_grad()
        policy.step_loss(o, theta, members).backward()
        optimizer.step()
        schedule.step()
    final = theta.detach().numpy()
    return tabular.regularised_reward(final), tabular.expected_reward(final)


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """All of the above for each seed; quick takes a few combinations, one fixed point and one short sampled run."""
    points = [("k1", "reward")] if quick else list(EXACT)
    exact = {f"exact_{e}_{p}": exact_fixed_point(e, p) for e, p in points}
    combinations = slice(None, None, 13) if quick else slice(None)
    out = []
    for seed in seeds:
        figures: dict[str, Any] = {"seed": seed, "gradient_error": gradient_error(seed, combinations), **exact}
        for name in ["rloo_k1_reward"] if quick else SAMPLED:
            settings, group, _, _ = SAMPLED[name]
            j, reward = sampled_run(settings, group, seed, 100 if quick else STEPS)
            figures |= {f"{name}_J": j, f"{name}_reward": reward}
        out.append(figures)
    return out


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        f["gradient_error"] < 1e-6
        and all(abs(f.get(f"exact_{e}_{p}", 9.0) - j) < 1e-5 for (e, p), j in EXACT.items())
        and all(abs(f.get(f"{name}_J", 9.0) - j) < 0.02 for name, (_, _, j, _) in SAMPLED.items())
        and all(abs(f.get(f"{name}_reward", 9.0) - r) < 0.05 for name, (_, _, _, r) in SAMPLED.items())
        for f in figures
    )
