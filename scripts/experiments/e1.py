"""E1: a pretraining mix removes what PPO costs on everything it is not rewarded for (InstructGPT, 2203.02155, 4.2)."""

from pathlib import Path
from typing import Any

from small_world import BAD, DOMAINS, GOOD, held_out, ppo, pretrain, temporary
from transformers import AutoModelForCausalLM

CLAIM = (
    "PPO that is rewarded for friendly prose raises the loss on held-out pretraining text (prose, sums, recall); "
    "PPO-ptx removes most of that rise at the same reward."
)
CRITERION = (
    "in every seed PPO raises the mean held-out loss by at least .15 nat a token, PPO-ptx removes at least 70% of the "
    "rise, and its reward over the last 10 iterations is at least 95% of PPO's"
)
SEEDS = [0, 1, 2, 3, 4]

PRETRAINING, STEPS, PTX_COEF = 1200, 120, 1.0


def friendly(completions: list[str], **_: Any) -> list[float]:
    """Good adjectives minus bad ones, a sentence."""
    scores = []
    for text in completions:
        words = text.split()
        balance = sum(w in GOOD for w in words) - sum(w in BAD for w in words)
        scores.append(balance / max(words.count("."), 1))
    return scores


def mean(values: dict[str, float]) -> float:
    """Over the domains."""
    return sum(values.values()) / len(values)


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Pretrain, then PPO without and with the mix from the same network; quick takes a few steps of each."""
    out = []
    for seed in seeds:
        figures: dict[str, Any] = {"seed": seed}
        with temporary() as name:
            base = Path(name) / "base"
            pretrain(base, seed, 60 if quick else PRETRAINING)
            before = held_out(AutoModelForCausalLM.from_pretrained(base), seed)
            figures |= {f"loss_{d}_base": before[d] for d in DOMAINS}
            for variant, coef in (("ppo", 0.0), ("ptx", PTX_COEF)):
                folder = Path(name) / variant
                folder.mkdir()
                network, rewards = ppo(
                    base,
                    folder,
                    seed,
                    friendly,
                    steps=3 if quick else STEPS,
                    ptx_coef=coef,
                    answers=16 if quick else 128,
                )
                after = held_out(network, seed)
                figures |= {f"loss_{d}_{variant}": after[d] for d in DOMAINS}
                figures[f"reward_{variant}"] = sum(rewards[-10:]) / len(rewards[-10:])
                figures[f"rise_{variant}"] = mean(after) - mean(before)
            figures["reward_base"] = rewards[0]
        figures["removed"] = 1 - figures["rise_ptx"] / figures["rise_ppo"] if figures["rise_ppo"] else 0.0
        out.append(figures)
    return out


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Rise of the loss against reward, a point a seed and variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for variant, label in (("ppo", "PPO"), ("ptx", "PPO-ptx")):
        axes.plot([f[f"reward_{variant}"] for f in figures], [f[f"rise_{variant}"] for f in figures], "o", label=label)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("reward over the last 10 iterations")
    axes.set_ylabel("rise of held-out loss [nat/token]")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        f["rise_ppo"] >= 0.15 and f["removed"] >= 0.7 and f["reward_ptx"] >= 0.95 * f["reward_ppo"] for f in figures
    )
