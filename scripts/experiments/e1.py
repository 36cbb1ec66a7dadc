"""E1: a pretraining mix removes what PPO costs on everything it is not rewarded for (InstructGPT, 2203.02155, 4.2).

And a heavier KL penalty is no substitute for it (section 4.2, E.7).
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from cores import one_a_core
from small_world import (
    BAD,
    DOMAINS,
    GOOD,
    NOUNS,
    PLAIN,
    VERBS,
    held_out,
    ppo,
    pretrain,
    rows,
    temporary,
    texts,
    tokenizer,
)
from transformers import AutoModelForCausalLM

CLAIM = (
    "PPO that is rewarded for friendly prose raises the loss on held-out pretraining text (prose, sums, recall); "
    "PPO-ptx removes most of that rise at the same reward, and ten or a hundred times the KL penalty does not."
)
CRITERION = (
    "in every seed PPO raises the mean held-out loss by at least .15 nat a token, PPO-ptx with a weight of .3 removes "
    "at least 70% of the rise while its reward over the last 10 iterations is within 5% of PPO's, and neither heavier "
    "penalty removes as much at 95% of the reward or more; other weights of the mix are shown beside it"
)
SEEDS = [0, 1, 2, 3, 4]

PRETRAINING, STEPS, LR, KL, ENOUGH = 1200, 150, 1e-3, 0.02, 3
# Weight of the mix, weight of the KL.
VARIANTS = {
    "ppo": (0.0, KL),
    "ptx_0.1": (0.1, KL),
    "ptx": (0.3, KL),
    "ptx_1": (1.0, KL),
    "ptx_10": (10.0, KL),
    "kl_10": (0.0, 10 * KL),
    "kl_100": (0.0, 100 * KL),
}
REMOVED, KEPT, BEYOND = 0.7, 0.95, 1.05
QUESTIONS = {"sums": "=", "recall": "?"}


def friendly(completions: list[str], **_: Any) -> list[float]:
    """Good adjectives minus bad ones, of which three are enough: from -1 to 1."""
    scores = []
    for text in completions:
        words = text.split()
        balance = sum(w in GOOD for w in words) - sum(w in BAD for w in words)
        scores.append(max(-ENOUGH, min(ENOUGH, balance)) / ENOUGH)
    return scores


def beginnings(path: Path, seed: int) -> Path:
    """Questions: the first words of a text of prose, up to its verb."""
    rng = random.Random(f"beginnings {seed}")
    found = {f"<s> the {rng.choice(PLAIN)} {rng.choice(NOUNS)} {rng.choice(VERBS)}": None for _ in range(2000)}
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in found))
    return path


@torch.no_grad()
def accuracy(network: Any, domain: str, seed: int) -> float:
    """Share of held-out answers whose last digit is the likeliest token."""
    words = tokenizer()
    ids = rows(words, texts(domain, 300, seed + 10_000))
    asked = torch.eq(ids, words.convert_tokens_to_ids(QUESTIONS[domain]))  # pyright: ignore[reportArgumentType, reportCallIssue]
    ahead = 1 if domain == "sums" else 0  # a sum's last digit stands one further behind its sign
    places = torch.nn.functional.pad(asked, (ahead, 0))[:, : ids.shape[1] - 1]
    likeliest = network(input_ids=ids).logits[:, :-1].argmax(-1)
    return float((likeliest == ids[:, 1:])[places].float().mean())


def mean(values: dict[str, float]) -> float:
    """Over the domains."""
    return sum(values.values()) / len(values)


def state_of(network: Any, name: str, seed: int) -> dict[str, float]:
    """Held-out loss and accuracy by domain, as figures."""
    losses = held_out(network, seed)
    return {f"loss_{d}_{name}": losses[d] for d in DOMAINS} | {
        f"accuracy_{d}_{name}": accuracy(network, d, seed) for d in QUESTIONS
    }


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


def label_of(variant: str) -> str:
    """How a picture names a variant."""
    mix, kl = VARIANTS[variant]
    if mix:
        return f"PPO-ptx, {mix:g}"
    return "PPO" if kl == KL else f"PPO, KL x {kl / KL:g}"


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Rise of the loss by domain, and reward against the mean rise; a point a seed and variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for i, variant in enumerate(VARIANTS):
        for j, d in enumerate(DOMAINS):
            rises = [f[f"loss_{d}_{variant}"] - f[f"loss_{d}_base"] for f in figures]
            place = j + 0.12 * (i - (len(VARIANTS) - 1) / 2)
            left.plot([place] * len(rises), rises, "o", markersize=4, color=f"C{i}", alpha=0.7)
        x, y = ([f[f"{what}_{variant}"] for f in figures] for what in ("rise", "reward"))
        right.plot(x, y, "o", markersize=4, color=f"C{i}", alpha=0.7, label=label_of(variant))
    left.axhline(0.0, color="black", linewidth=0.8)
    left.set_xticks(range(len(DOMAINS)), DOMAINS)
    left.set_ylabel("rise of held-out loss [nat/token]")
    right.set_xlabel("mean rise of held-out loss [nat/token]")
    right.set_ylabel("reward, last 10 iterations")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""

    def falls_short(f: dict[str, Any], variant: str) -> bool:
        return f[f"removed_{variant}"] < REMOVED or f[f"kept_{variant}"] < KEPT

    return bool(figures) and all(
        f["rise_ppo"] >= 0.15
        and f["removed_ptx"] >= REMOVED
        and KEPT <= f["kept_ptx"] <= BEYOND
        and all(falls_short(f, variant) for variant in VARIANTS if variant.startswith("kl"))
        for f in figures
    )
