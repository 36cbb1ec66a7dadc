"""E4: the win rate against sampling temperature, DPO's and PPO's (DPO, 2305.18290, section 6.2), in the small world."""

from pathlib import Path
from typing import Any

import torch
from cores import one_a_core
from labels import comparisons
from sentiment import Checkpoints, dpo, gold, judge, measure, prefixes, sample, write
from small_world import ppo, pretrain, temporary
from torch import Tensor
from transformers import AutoModelForCausalLM

CLAIM = (
    "At about equal KL to the reference, DPO's win rate against reference completions depends less on the sampling "
    "temperature than PPO's."
)
CRITERION = (
    "in every seed the slope of the gold-judged win rate on the temperature over {0, .25, .5, .75, 1} is smaller in "
    "size for DPO than for PPO, 95% bootstrap CI of the difference over held-out prompts above 0, at "
    "KLs of which neither exceeds the other by more than half"
)
SEEDS = [3, 4, 5]

PRETRAINING, PREFIXES, HELD_OUT, COUNT = 600, 2000, 256, 4
BETA, COEF = 0.3, 0.1
DPO_STEPS, DPO_EVERY, PPO_STEPS, PPO_LR, DPO_LR = 240, 15, 60, 1e-3, 1e-4
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)


def train(base: Path, root: Path, seed: int, quick: bool) -> tuple[Any, dict[str, Any], list[str]]:
    """The reference; PPO at its end, and the DPO network whose KL came closest to PPO's; held-out prompts."""
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts, held_out = prefixes(seed, 160 if quick else PREFIXES, 16 if quick else HELD_OUT)
    # KL for the choice of DPO's checkpoint is measured on training prompts.
    probe = prompts[: len(held_out)]
    questions = write(root / "questions.jsonl", [{"question": p} for p in prompts])
    trained, _ = ppo(
        base, root, seed, judge, steps=2 if quick else PPO_STEPS, kl=COEF, lr=PPO_LR, questions=questions,
        answers=16 if quick else 128,
    )  # fmt: skip
    aim = measure(trained, reference, probe, seed).mean[0]
    best: dict[str, Any] = {"distance": float("inf")}

    def look(network: Any) -> None:
        distance = abs(measure(network, reference, probe, seed).mean[0] - aim)
        if distance < best["distance"]:
            best.update(distance=distance, weights={k: v.clone() for k, v in network.state_dict().items()})

    pairs = write(root / "pairs.jsonl", comparisons(reference, prompts, PREFIXES * 6, seed, gold))
    watching = Checkpoints(base, 1 if quick else DPO_EVERY, look)
    dpo(base, root, pairs, seed, BETA, 2 if quick else DPO_STEPS, watching, DPO_LR)
    watching.network.load_state_dict(best["weights"])
    return reference, {"dpo": watching.network, "ppo": trained}, held_out


def wins(network: Any, against: Tensor, prompts: list[str], temperature: float, seed: int) -> Tensor:
    """Share of samples that gold prefers to the reference's, a number a prompt; a tie is half a win."""
    rewards = torch.tensor([gold(text) for text in sample(network, prompts, COUNT, temperature, seed).texts])
    won = (rewards > against).float() + 0.5 * (rewards == against)
    return won.view(-1, COUNT).mean(1)


def slope(rates: Tensor) -> Tensor:
    """Least-squares slope of rates [.., temperatures] on the temperature."""
    centred = torch.tensor(TEMPERATURES) - sum(TEMPERATURES) / len(TEMPERATURES)
    return (rates * centred).sum(-1) / centred.square().sum()


def compare(rates: dict[str, Tensor], seed: int) -> dict[str, float]:
    """Slopes of the mean rates [prompts, temperatures], and how much flatter DPO's is, with its interval."""
    slopes = {name: slope(each.mean(0)) for name, each in rates.items()}
    count = len(rates["dpo"])
    rows = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(seed))
    resampled = {name: slope(each[rows].mean(1)).abs() for name, each in rates.items()}
    low, high = (resampled["ppo"] - resampled["dpo"]).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "slope_dpo": float(slopes["dpo"]),
        "slope_ppo": float(slopes["ppo"]),
        "flatter": float(slopes["ppo"].abs() - slopes["dpo"].abs()),
        "flatter_low": low,
        "flatter_high": high,
    }


def one(seed: int, quick: bool) -> dict[str, Any]:
    """A seed's figures."""
    with temporary() as name:
        base = Path(name) / "base"
        pretrain(base, seed, 20 if quick else PRETRAINING, layers=2, width=64)
        reference, networks, prompts = train(base, Path(name), seed, quick)
    # The reference's samples have random numbers of their own.
    against = torch.tensor([gold(text) for text in sample(reference, prompts, COUNT, 1.0, seed + 1000).texts])
    figures: dict[str, Any] = {"seed": seed}
    rates: dict[str, Tensor] = {}
    for arm, network in networks.items():
        each = [wins(network, against, prompts, t, seed + i) for i, t in enumerate(TEMPERATURES)]
        rates[arm] = torch.stack(each, 1)
        figures[f"kl_{arm}"], figures[f"reward_{arm}"] = measure(network, reference, prompts, seed).mean
        figures |= {f"win_{arm}_{t:g}": float(r.mean()) for t, r in zip(TEMPERATURES, each, strict=True)}
    return {**figures, **compare(rates, seed)}


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Pretrain, train both, sample at every temperature; quick takes two steps of each."""
    return one_a_core(one, seeds, quick)


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Win rate against temperature, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for arm, label, colour in (("dpo", "DPO", "C0"), ("ppo", "PPO, gold reward", "C1")):
        for i, f in enumerate(figures):
            rates = [f[f"win_{arm}_{t:g}"] for t in TEMPERATURES]
            axes.plot(TEMPERATURES, rates, "o-", color=colour, alpha=0.7, label="" if i else label)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set_xlabel("sampling temperature")
    axes.set_ylabel("win rate against the reference at 1")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        f["flatter"] > 0 and f["flatter_low"] > 0 and 2 / 3 <= f["kl_dpo"] / f["kl_ppo"] <= 1.5 for f in figures
    )
