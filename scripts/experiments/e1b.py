"""E1b: a heavier KL penalty is no substitute for the pretraining mix (InstructGPT, 2203.02155, section 4.2, E.7)."""

from pathlib import Path
from typing import Any

from cores import one_a_core
from e1 import KL, LR, PRETRAINING, PTX_COEF, STEPS, beginnings, friendly, mean, state_of
from small_world import DOMAINS, ppo, pretrain, temporary
from transformers import AutoModelForCausalLM

CLAIM = (
    "Ten or a hundred times the KL penalty does not do what the pretraining mix does: it leaves the rise of the loss "
    "on held-out pretraining text, or it takes the reward away."
)
CRITERION = (
    "in every seed the mix removes at least 70% of PPO's rise of the mean held-out loss at 95% of its reward or more, "
    "and neither heavier penalty does both"
)
SEEDS = [0, 1, 2, 3, 4]

# Weight of the mix, weight of the KL.
VARIANTS = {"ppo": (0.0, KL), "kl10": (0.0, 10 * KL), "kl100": (0.0, 100 * KL), "ptx": (PTX_COEF, KL)}
REMOVED, KEPT = 0.7, 0.95


def one(seed: int, quick: bool) -> dict[str, Any]:
    """Pretrain, then every variant from the same network; quick takes a few steps of each."""
    figures: dict[str, Any] = {"seed": seed}
    with temporary() as name:
        root, base = Path(name), Path(name) / "base"
        pretrain(base, seed, 60 if quick else PRETRAINING, layers=2, width=64)
        figures |= state_of(AutoModelForCausalLM.from_pretrained(base), "base", seed)
        questions = beginnings(root / "questions.jsonl", seed)
        for variant, (mix, kl) in VARIANTS.items():
            network, rewards = ppo(
                base, root, seed, friendly, steps=3 if quick else STEPS, ptx_coef=mix, kl=kl, lr=LR,
                answers=16 if quick else 128, questions=questions,
            )  # fmt: skip
            figures |= state_of(network, variant, seed)
            figures["reward_base"] = rewards[0]
            figures[f"reward_{variant}"] = sum(rewards[-10:]) / len(rewards[-10:])
            rises = {d: figures[f"loss_{d}_{variant}"] - figures[f"loss_{d}_base"] for d in DOMAINS}
            figures[f"rise_{variant}"] = mean(rises)
    for variant in VARIANTS:
        if variant != "ppo":
            removed = 1 - figures[f"rise_{variant}"] / figures["rise_ppo"] if figures["rise_ppo"] else 0.0
            figures[f"removed_{variant}"] = removed
            figures[f"kept_{variant}"] = figures[f"reward_{variant}"] / figures["reward_ppo"]
    return figures


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """One seed a core."""
    return one_a_core(one, seeds, quick)


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Reward against the rise of the loss, a point a seed and variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    labels = {"ppo": "PPO", "kl10": "PPO, KL x 10", "kl100": "PPO, KL x 100", "ptx": "PPO-ptx"}
    for variant in VARIANTS:
        x, y = ([f[f"{what}_{variant}"] for f in figures] for what in ("rise", "reward"))
        axes.plot(x, y, "o", alpha=0.7, label=labels[variant])
    axes.set_xlabel("rise of held-out loss [nat/token]")
    axes.set_ylabel("reward, last 10 iterations")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""

    def falls_short(f: dict[str, Any], variant: str) -> bool:
        return f[f"removed_{variant}"] < REMOVED or f[f"kept_{variant}"] < KEPT

    return bool(figures) and all(
        f["rise_ppo"] > 0
        and f["removed_ptx"] >= REMOVED
        and f["kept_ptx"] >= KEPT
        and all(falls_short(f, variant) for variant in VARIANTS if variant.startswith("kl"))
        for f in figures
    )
