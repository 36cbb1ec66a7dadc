"""E2: over-optimisation of a learned reward (Gao et al., 2210.10760; Stiennon et al., 2009.01325), in the small world.

Too much of a good thing: gold counts good adjectives up to ``ENOUGH`` and then falls. Reward models learn from
comparisons of the pretrained network's own samples, which hold more than that only now and then, so a model of few
comparisons does not know of the fall, and one of many does.
"""

from pathlib import Path
from typing import Any

import torch
from cores import one_a_core
from labels import comparisons, reward_model
from sentiment import Checkpoints, log_probs, prefixes, sample, write
from small_world import GOOD, ppo, pretrain, temporary
from transformers import AutoModelForCausalLM

from lit_posttrain.rewards import LearnedReward
from lit_posttrain.types import Sample

CLAIM = (
    "As PPO without a KL penalty goes on, the learned reward keeps rising while the gold reward rises and then falls; "
    "where the reward model has seen more comparisons, gold keeps its peak to a larger KL."
)
CRITERION = (
    "in every seed, for the smallest number of comparisons gold peaks above the reference by at least .2 of its "
    "standard deviation there and then falls by at least .2, for every number the proxy at the end is no lower than "
    "where gold peaks, and the largest KL at which gold is within .1 of its peak is larger for the largest number than "
    "for the smallest"
)
SEEDS = [0, 1, 2, 3]

PRETRAINING, PREFIXES, HELD_OUT, COUNT = 600, 4000, 256, 4
COMPARISONS = (1000, 3000, 10000)
EPOCHS, REWARD_LR = 4, 1e-3
STEPS, EVERY, LR = 80, 5, 3e-4
ENOUGH, FALL = 3, 1.5
NEAR = 0.1  # of the gold reward's standard deviation: three standard errors of a look


def gold(text: str) -> float:
    """Good adjectives up to ``ENOUGH``; each further one costs ``FALL``, down to -3."""
    count = sum(word in GOOD for word in text.split())
    return max(-3.0, min(count, ENOUGH) - FALL * max(count - ENOUGH, 0))


class Watch:
    """Measures a policy on held-out prompts: KL to the reference, gold and proxy.

    Args:
        reference: The pretrained network.
        prompts: Held out.
        seed: Of the samples.
    """

    def __init__(self, reference: Any, prompts: list[str], seed: int):
        self.reference, self.prompts, self.seed = reference, prompts, seed

    def __call__(self, network: Any, reward: LearnedReward) -> dict[str, float]:
        """Means over the samples."""
        drawn = sample(network, self.prompts, COUNT, 1.0, self.seed)
        kl = (log_probs(network, drawn) - log_probs(self.reference, drawn)).mean()
        asked = [p for p in self.prompts for _ in range(COUNT)]
        ended = [2 in drawn.of(row) for row in range(len(asked))]
        answers = [
            Sample(p, text, [], "stop" if end else "length", None, {})
            for p, text, end in zip(asked, drawn.texts, ended, strict=True)
        ]
        proxy = torch.tensor([float(score) for score in reward.scores(answers)])  # pyright: ignore[reportArgumentType]
        golds = torch.tensor([gold(text) for text in drawn.texts])
        return {
            "kl": float(kl),
            "gold": float(golds.mean()),
            "proxy": float(proxy.mean()),
            "gold_sd": float(golds.std()),
        }


def over_optimise(root: Path, prompts: list[str], watch: Watch, pairs: Path, count: int, quick: bool) -> dict[str, Any]:
    """A reward model of ``count`` comparisons, then PPO on it without a KL penalty; the curve in figures."""
    folder, base = root / f"n{count}", root / "base"
    reward = reward_model(base, folder, pairs, watch.seed, 1 if quick else EPOCHS, REWARD_LR)
    points = [watch(watch.reference, reward)]
    look = Checkpoints(base, 1 if quick else EVERY, lambda network: points.append(watch(network, reward)))
    questions = write(root / "questions.jsonl", [{"question": p} for p in prompts])
    ppo(
        base, folder, watch.seed, reward, steps=2 if quick else STEPS, kl=0.0, lr=LR, questions=questions,
        answers=16 if quick else 128, callbacks=[look],
    )  # fmt: skip
    best = max(range(len(points)), key=lambda i: points[i]["gold"])
    start, peak, end = points[0], points[best], points[-1]
    figures = {
        "rise": (peak["gold"] - start["gold"]) / start["gold_sd"],
        "fall": (peak["gold"] - end["gold"]) / start["gold_sd"],
        "peak_kl": max(p["kl"] for p in points if p["gold"] >= peak["gold"] - NEAR * start["gold_sd"]),
        "proxy_gain_after_peak": end["proxy"] - peak["proxy"],
    }
    for i, point in enumerate(points):
        figures |= {f"{what}_{i}": point[what] for what in ("kl", "gold", "proxy")}
    return {f"n{count}_{name}": value for name, value in figures.items()}


def one(seed: int, quick: bool) -> dict[str, Any]:
    """Pretrain, compare, then every number of comparisons; quick takes a few steps of each."""
    figures: dict[str, Any] = {"seed": seed}
    prompts, held_out = prefixes(seed, 64 if quick else PREFIXES, 16 if quick else HELD_OUT)
    with temporary() as name:
        root = Path(name)
        pretrain(root / "base", seed, 20 if quick else PRETRAINING, layers=2, width=64)
        reference = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        watch = Watch(reference, held_out, seed)
        every = comparisons(reference, prompts, max(COMPARISONS), seed, gold)
        for count in COMPARISONS:
            pairs = write(root / f"pairs{count}.jsonl", every[:count])
            figures |= over_optimise(root, prompts, watch, pairs, count, quick)
    return figures


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """One seed a core."""
    return one_a_core(one, seeds, quick)


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Gold and proxy against sqrt(KL), a line a seed; proxies count from the reference's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, len(COMPARISONS), figsize=(3.2 * len(COMPARISONS), 3.2), sharey=True)
    for axes, count in zip(every, COMPARISONS, strict=True):
        for j, f in enumerate(figures):
            looks = sum(name.startswith(f"n{count}_gold_") for name in f)
            kl, gold_, proxy = ([f[f"n{count}_{what}_{i}"] for i in range(looks)] for what in ("kl", "gold", "proxy"))
            d = [max(k, 0.0) ** 0.5 for k in kl]
            axes.plot(d, gold_, "o-", markersize=3, color="C0", alpha=0.8, label="" if j else "gold")
            axes.plot(
                d, [p - proxy[0] + gold_[0] for p in proxy], ".--", color="C1", alpha=0.6, label="" if j else "proxy"
            )
        axes.set_title(f"{count} comparisons", fontsize=9)
        axes.set_xlabel("sqrt(KL) [nat$^{1/2}$]")
    every[0].set_ylabel("reward")
    every[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    few, many = COMPARISONS[0], COMPARISONS[-1]
    return bool(figures) and all(
        f[f"n{few}_rise"] >= 0.2
        and f[f"n{few}_fall"] >= 0.2
        and 0 < f[f"n{few}_peak_kl"] < f[f"n{many}_peak_kl"]
        and all(f[f"n{n}_proxy_gain_after_peak"] >= 0 for n in COMPARISONS)
        for f in figures
    )
