"""E3: DPO's frontier of reward against KL beside PPO's, in controlled sentiment (DPO, 2305.18290, section 6.1)."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cores import one_a_core
from labels import comparisons, reward_model
from sentiment import Checkpoints, Point, dpo, gold, judge, measure, preferences, preferred_ft, prefixes, write
from small_world import ppo, pretrain, temporary
from tabular_policy import (  # pyright: ignore[reportMissingImports]: tests/ is on reproduce.py's path
    REWARDS,
    THETA_REF,
    answer_log_probs,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_posttrain.functional.preference_losses import PairLossOptions, PairTerms, pair_loss

CLAIM = (
    "In controlled sentiment DPO's frontier of reward against KL is at least PPO's, even where PPO has the true "
    "reward; in the tabular model DPO of the population reaches the exact curve."
)
CRITERION = (
    "in every seed the mean height of DPO's frontier over its and PPO's common KL (to 10 at most) exceeds that of PPO "
    "with the gold reward, 95% bootstrap CI over held-out prompts above 0; in the tabular model DPO's reward is within "
    "3% of the exact optimum at its KL for each beta"
)
SEEDS = [3, 4, 5]

PRETRAINING, PREFIXES, HELD_OUT = 600, 2000, 512
BETAS, NOISY_BETAS = (0.05, 0.1, 0.3, 1.0, 5.0), (0.1,)
TARGETS, LEARNED_TARGETS = (3.0, 6.0, 9.0, 12.0), (3.0, 6.0)  # nat an answer
COEF, HORIZON = 0.05, 640.0  # the KL's weight at first, and the answers over which it is adapted
COEFS = (0.3, 0.1)  # kept as they are: PPO's frontier below the smallest target
DPO_STEPS, PPO_STEPS, FT_STEPS, LOOKS, PPO_LR, DPO_LR = 240, 60, 80, 4, 1e-3, 1e-4
REWARD_EPOCHS, REWARD_LR = 3, 1e-3
FAR, NEAR = 10.0, 4.0  # nat: how far frontiers are compared at most, and a nearer end beside it
TABULAR_BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)

Runs = dict[str, list[Point]]


# --- the tabular model ------------------------------------------------------------------------------------------


def expected(log_policy: Tensor) -> tuple[float, float]:
    """KL and reward of a distribution over the answers."""
    p = log_policy.exp()
    return float((p * (log_policy - answer_log_probs(THETA_REF))).sum()), float((p * REWARDS).sum())


def exact(beta: float) -> tuple[float, float]:
    """KL and reward of pi_ref exp(r / beta) / Z."""
    return expected((answer_log_probs(THETA_REF) + REWARDS / beta).log_softmax(0))


def highest_reward(kl: float) -> float:
    """The exact curve at this KL, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if exact(middle)[0] > kl else (low, middle)
    return exact(high)[1]


def population_dpo(beta: float, iterations: int) -> tuple[float, float]:
    """KL and reward of the minimum of DPO's loss over all pairs of answers, labelled with their probabilities."""
    one, other = torch.combinations(torch.arange(len(REWARDS))).T
    wins = torch.sigmoid(REWARDS[one] - REWARDS[other])
    reference, nothing = answer_log_probs(THETA_REF), torch.zeros(len(one))
    theta = THETA_REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=iterations, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss_of(a: Tensor, b: Tensor) -> Tensor:
        own = answer_log_probs(theta)
        terms = PairTerms(own[a], own[b], reference[a], reference[b], nothing, nothing)
        return pair_loss(terms, "sigmoid", PairLossOptions(beta=beta))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (wins * loss_of(one, other) + (1 - wins) * loss_of(other, one)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return expected(answer_log_probs(theta).detach())


def tabular(iterations: int) -> dict[str, float]:
    """How far below the exact curve DPO ends, as a share of the reward there."""
    out = {}
    for beta in TABULAR_BETAS:
        kl, reward = population_dpo(beta, iterations)
        out[f"tabular_kl_{beta:g}"], out[f"tabular_reward_{beta:g}"] = kl, reward
        out[f"tabular_gap_{beta:g}"] = 1 - reward / highest_reward(kl)
    return out


# --- frontiers --------------------------------------------------------------------------------------------------


def height(points: list[tuple[float, float]], limit: float) -> float:
    """Mean height over KL 0 to ``limit`` of the concave envelope of (KL, reward) points; level beyond the highest."""
    points = sorted((max(kl, 0.0), reward) for kl, reward in points)
    best = max(points, key=lambda p: p[1])
    hull: list[tuple[float, float]] = []
    for x, y in [p for p in points if p[0] <= best[0]]:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) <= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    hull.append((max(limit, best[0]) + 1.0, best[1]))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(hull):
        end = min(x1, limit)
        if end > x0:
            area += (end - x0) * (y0 + (y1 - y0) * (end - x0) / (x1 - x0) / 2)
    return area / limit


def frontier(reference: Point, runs: Runs, arm: str, rows: Tensor | None = None) -> list[tuple[float, float]]:
    """All points of an arm's runs and the reference, over all prompts or a sample of them."""
    every = [reference, *(p for name, points in runs.items() if name.startswith(arm + "_") for p in points)]
    if rows is None:
        return [p.mean for p in every]
    return [Point(p.rewards[rows], p.kls[rows]).mean for p in every]


def compare(reference: Point, runs: Runs, seed: int) -> dict[str, float]:
    """Heights of the frontiers, and how far DPO's lies above the others, with intervals."""
    arms = sorted({name.rsplit("_", 1)[0] for name in runs} & {"dpo", "ppo", "learned", "noisy"})
    reach = {arm: max(kl for kl, _ in frontier(reference, runs, arm)) for arm in arms}
    far = max(1e-3, min(FAR, reach["dpo"], reach["ppo"]))
    limits = {"": far, "_to_4": min(NEAR, far)}
    generator = torch.Generator().manual_seed(seed)
    count = len(reference.rewards)
    samples = [None, *(torch.randint(count, (count,), generator=generator) for _ in range(500))]
    # [sample, arm, limit]; the first sample is every prompt once.
    heights = torch.tensor(
        [[[height(frontier(reference, runs, arm, r), x) for x in limits.values()] for arm in arms] for r in samples]
    )
    out = {"common_kl": far}
    for j, end in enumerate(limits):
        out |= {f"height_{arm}{end}": float(heights[0, i, j]) for i, arm in enumerate(arms)}
        for i, other in enumerate(arms):
            difference = heights[:, arms.index("dpo"), j] - heights[:, i, j]
            low, high = difference[1:].quantile(torch.tensor([0.025, 0.975])).tolist()
            if other != "dpo":
                name = f"dpo_minus_{other}{end}"
                out |= {name: float(difference[0]), f"{name}_low": low, f"{name}_high": high}
    return out


class TargetKL(pl.Callback):
    """Has PPO adapt the KL's weight to a target.

    Args:
        target: KL of an answer, in nats.
    """

    def __init__(self, target: float):
        self.target = target

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Into the objective, whose weight is fixed in the small world."""
        kl = replace(pl_module.objective.kl, target=self.target, horizon=HORIZON)
        pl_module.objective = replace(pl_module.objective, kl=kl)


def train(base: Path, root: Path, seed: int, quick: bool) -> tuple[Point, Runs]:
    """Every run, measured at each look."""
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts, held_out = prefixes(seed, 160 if quick else PREFIXES, 16 if quick else HELD_OUT)
    pairs = write(root / "pairs.jsonl", comparisons(reference, prompts, PREFIXES * 6, seed, gold))
    noisy = write(root / "noisy.jsonl", preferences(reference, prompts, seed))
    questions = write(root / "questions.jsonl", [{"question": p} for p in prompts])
    looks = 2 if quick else LOOKS
    dpo_every, ppo_every, ft_every = (1 if quick else n // LOOKS for n in (DPO_STEPS, PPO_STEPS, FT_STEPS))
    runs: Runs = {}

    def watch(name: str, every: int) -> tuple[Path, Checkpoints]:
        (root / name).mkdir()
        points = runs.setdefault(name, [])
        look = lambda network: points.append(measure(network, reference, held_out, seed))  # noqa: E731
        return root / name, Checkpoints(base, every, look)

    for arm, betas, labels in (("dpo", BETAS, pairs), ("noisy", NOISY_BETAS, noisy)):
        for beta in betas:
            folder, watching = watch(f"{arm}_{beta:g}", dpo_every)
            dpo(base, folder, labels, seed, beta, dpo_every * looks, watching, DPO_LR)
    online = partial(
        ppo, steps=ppo_every * looks, lr=PPO_LR, kl=COEF, questions=questions, answers=16 if quick else 128
    )  # fmt: skip
    for coef in COEFS:
        folder, watching = watch(f"ppo_c{coef:g}", ppo_every)
        online(base, folder, seed, judge, kl=coef, callbacks=[watching])
    for target in TARGETS:
        folder, watching = watch(f"ppo_{target:g}", ppo_every)
        online(base, folder, seed, judge, callbacks=[TargetKL(target), watching])
    learned = reward_model(base, root / "reward", pairs, seed, 1 if quick else REWARD_EPOCHS, REWARD_LR)
    for target in LEARNED_TARGETS:
        folder, watching = watch(f"learned_{target:g}", ppo_every)
        online(base, folder, seed, learned, callbacks=[TargetKL(target), watching])
    folder, watching = watch("preferred_ft", ft_every)
    preferred_ft(base, folder, pairs, seed, ft_every * looks, watching)
    return measure(reference, reference, held_out, seed), runs


def one(seed: int, quick: bool) -> dict[str, Any]:
    """A seed's figures."""
    with temporary() as name:
        base = Path(name) / "base"
        pretrain(base, seed, 20 if quick else PRETRAINING, layers=2, width=64)
        reference, runs = train(base, Path(name), seed, quick)
    figures: dict[str, Any] = {"seed": seed, **compare(reference, runs, seed)}
    figures["reference_reward"] = reference.mean[1]
    for arm, points in runs.items():
        for i, point in enumerate(points, 1):
            figures[f"kl_{arm}_{i}"], figures[f"reward_{arm}_{i}"] = point.mean
    return figures


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Pretrain, compare samples, train every arm; quick takes a few steps of each."""
    exactly = tabular(20 if quick else 2000)
    return [{**figures, **exactly} for figures in one_a_core(one, seeds, quick)]


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Every point of every seed, and beside it the tabular model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (axes, exactly) = pyplot.subplots(1, 2, figsize=(10, 4))
    labels = {
        "dpo": "DPO",
        "ppo": "PPO, gold reward",
        "learned": "PPO, learned reward",
        "noisy": "DPO, noisy labels",
        "preferred": "Preferred-FT",
    }
    for i, (arm, label) in enumerate(labels.items()):
        names = [n for n in figures[0] if n.startswith(f"kl_{arm}_")]
        x, y = ([f[n.replace("kl_", w, 1)] for f in figures for n in names] for w in ("kl_", "reward_"))
        axes.plot(x, y, "osdv^"[i], markersize=4, alpha=0.6, label=label)
    axes.plot([0.0] * len(figures), [f["reference_reward"] for f in figures], "k*", label="reference")
    axes.set_xlim(-0.5, 1.5 * FAR)
    axes.set_xlabel("KL to the reference [nat an answer]")
    axes.set_ylabel("gold reward")
    axes.legend()
    curve = [exact(10 ** (i / 20 - 1.1)) for i in range(34)]
    exactly.plot([kl for kl, _ in curve], [reward for _, reward in curve], "k-", label="exact curve")
    x, y = ([figures[0][f"tabular_{what}_{b:g}"] for b in TABULAR_BETAS] for what in ("kl", "reward"))
    exactly.plot(x, y, "o", label="DPO of the population")
    exactly.set_xlabel("KL")
    exactly.set_ylabel("E[r], tabular model")
    exactly.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        f["dpo_minus_ppo_low"] > 0 and all(abs(f[f"tabular_gap_{beta:g}"]) <= 0.03 for beta in TABULAR_BETAS)
        for f in figures
    )
