"""E2b: best-of-n against learned rewards of several sizes and amounts of data (Gao et al., 2210.10760), in E2's world.

The answer that a learned reward likes best among n samples of the pretrained network, n from 1 to ``N``. Nothing is
trained but the reward models, and the KL of the choice is known: log n - (n - 1) / n.
"""

import math
from pathlib import Path
from typing import Any

import torch
from cores import one_a_core
from e2 import EPOCHS, NEAR, PREFIXES, PRETRAINING, REWARD_LR, gold
from labels import comparisons, reward_model
from sentiment import prefixes, sample, write
from small_world import pretrain, temporary
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_posttrain.types import Sample

CLAIM = (
    "As n grows, the gold reward of the best of n by a learned reward follows d (alpha - beta d) with d = sqrt(KL), "
    "and it peaks later where the reward model has seen more comparisons."
)
CRITERION = (
    "in every seed, for 300, 1,000, 3,000 and 10,000 comparisons and a reward model of the network's width the gain of "
    "gold at n = 1, 2, 4, .. 1,024 fits d (alpha - beta d) with R^2 above .9, and the KL at which gold peaks is larger "
    "for 10,000 comparisons than for 300; other widths are shown beside it"
)
SEEDS = [0, 1, 2]

HELD_OUT, N, AT_ONCE = 256, 1024, 4
WIDTH, COMPARISONS = 64, (300, 1000, 3000, 10000)
WIDTHS, COMPARISONS_OF_WIDTHS = (8, 16, 32, 128), 3000
MODELS = [(count, WIDTH) for count in COMPARISONS] + [(COMPARISONS_OF_WIDTHS, width) for width in WIDTHS]


def sizes() -> list[int]:
    """Every n."""
    return [2**i for i in range(N.bit_length())]


def kl_of(n: int) -> float:
    """KL of the best of n to the distribution of one (Stiennon et al., 2009.01325, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def best_of(order: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the best by ``order`` among n of a row's samples, without bias (2112.09332, appendix I).

    Args:
        order: Proxy scores [prompts, samples].
        values: What is asked of the best [prompts, samples].
        n: How many are drawn without replacement, 1 to the number of samples.

    Returns:
        One number a prompt.
    """
    count = order.shape[1]
    rank = torch.arange(1, count + 1, dtype=torch.float64)

    def log_choose(m: Tensor, k: int) -> Tensor:
        return torch.lgamma(m + 1) - math.lgamma(k + 1) - torch.lgamma((m - k + 1).clamp(min=1))

    # The sample of rank i is the best where the other n - 1 come from the i - 1 below it.
    weight = (log_choose(rank - 1, n - 1) - log_choose(torch.tensor(float(count), dtype=torch.float64), n)).exp()
    ascending = values.double().gather(1, order.argsort(1))
    return (ascending * weight.where(rank >= n, 0.0)).sum(1)


def quadratic(d: list[float], gain: list[float]) -> tuple[float, float, float]:
    """Least-squares alpha, beta and R^2 of gain = d (alpha - beta d)."""
    x, y = torch.tensor(d, dtype=torch.float64), torch.tensor(gain, dtype=torch.float64)
    design = torch.stack([x, -(x**2)], 1)
    found = torch.linalg.lstsq(design, y[:, None]).solution
    left = (y - (design @ found)[:, 0]).square().sum()
    r2 = 1 - left / (y - y.mean()).square().sum()
    return float(found[0]), float(found[1]), float(r2)


def draw(reference: Any, prompts: list[str], count: int, seed: int) -> list[Sample]:
    """``count`` answers of every prompt, in a row."""
    answers = []
    for first in range(0, len(prompts), AT_ONCE):
        asked = prompts[first : first + AT_ONCE]
        drawn = sample(reference, asked, count, 1.0, 10_000 * seed + first)
        for row, text in enumerate(drawn.texts):
            reason = "stop" if 2 in drawn.of(row) else "length"
            answers.append(Sample(asked[row // count], text, [], reason, None, {}))
    return answers


def accuracy(proxy: Tensor, golds: Tensor) -> float:
    """Share of neighbouring samples' pairs, ties by gold left out, that the proxy orders as gold does."""
    difference = golds[:, ::2] - golds[:, 1::2]
    right = (proxy[:, ::2] - proxy[:, 1::2]) * difference > 0
    return float(right[difference != 0].float().mean())


def curve(proxy: Tensor, golds: Tensor) -> dict[str, float]:
    """What a reward model makes of best-of-n [prompts, samples]."""
    figures = {"accuracy": accuracy(proxy, golds)}
    mean: list[float] = []
    for n in sizes():
        mean.append(float(best_of(proxy, golds, n).mean()))
        figures |= {f"gold_{n}": mean[-1], f"proxy_{n}": float(best_of(proxy, proxy, n).mean())}
    kls = [kl_of(n) for n in sizes()]
    alpha, beta, r2 = quadratic([kl**0.5 for kl in kls], [m - mean[0] for m in mean])
    near = NEAR * float(golds.std())
    return {
        **figures,
        "alpha": alpha,
        "beta": beta,
        "r2": r2,
        "fall": (max(mean) - mean[-1]) / float(golds.std()),
        "peak_kl": max(kl for kl, m in zip(kls, mean, strict=True) if m >= max(mean) - near),
    }


def one(seed: int, quick: bool) -> dict[str, Any]:
    """Pretrain, compare, sample; then every reward model judges the same samples. Quick takes little of each."""
    figures: dict[str, Any] = {"seed": seed}
    prompts, held_out = prefixes(seed, 64 if quick else PREFIXES, 4 if quick else HELD_OUT)
    with temporary() as name:
        root = Path(name)
        for width in {width for _, width in MODELS}:
            pretrain(root / f"w{width}", seed, 20 if quick else PRETRAINING, layers=2, width=width)
        reference = AutoModelForCausalLM.from_pretrained(root / f"w{WIDTH}", dtype=torch.float32)
        every = comparisons(reference, prompts, max(COMPARISONS), seed, gold)
        answers = draw(reference, held_out, N, seed)
        golds = torch.tensor([gold(answer.completion) for answer in answers]).view(len(held_out), N)
        for count, width in MODELS:
            label = f"n{count}_w{width}"
            pairs = write(root / f"pairs{count}.jsonl", every[:count])
            reward = reward_model(root / f"w{width}", root / label, pairs, seed, 1 if quick else EPOCHS, REWARD_LR)
            scores = torch.tensor([float(s) for s in reward.scores(answers)])  # pyright: ignore[reportArgumentType]
            figures |= {f"{label}_{what}": value for what, value in curve(scores.view_as(golds), golds).items()}
    return figures


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """One seed a core."""
    return one_a_core(one, seeds, quick)


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Gold against sqrt(KL) with its fits: by comparisons, and by the reward model's width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    by_width = sorted([m for m in MODELS if m[0] == COMPARISONS_OF_WIDTHS], key=lambda m: m[1])
    d = [kl_of(n) ** 0.5 for n in sizes()]
    for axes, models, label in (
        (panels[0], MODELS[: len(COMPARISONS)], "{0:,} comparisons"),
        (panels[1], by_width, "width {1}"),
    ):
        for i, (count, width) in enumerate(models):
            for j, f in enumerate(figures):
                named = label.format(count, width) if j == 0 else ""
                values = [f[f"n{count}_w{width}_gold_{n}"] for n in sizes()]
                axes.plot(d, values, "o-", markersize=3, color=f"C{i}", alpha=0.7, label=named)
        axes.set_xlabel("sqrt(KL) [nat$^{1/2}$]")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("gold reward of the best of n")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    few, many = (f"n{count}_w{WIDTH}_peak_kl" for count in (COMPARISONS[0], COMPARISONS[-1]))
    return bool(figures) and all(
        0 <= f[few] < f[many] and all(f[f"n{count}_w{WIDTH}_r2"] > 0.9 for count in COMPARISONS) for f in figures
    )
