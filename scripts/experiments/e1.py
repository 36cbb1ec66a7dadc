"""E1: a pretraining mix removes what PPO costs on everything it is not rewarded for (InstructGPT, 2203.02155, 4.2)."""

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import torch
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
    "PPO-ptx removes most of that rise at the same reward."
)
CRITERION = (
    "in every seed PPO raises the mean held-out loss by at least .15 nat a token, PPO-ptx removes at least 70% of the "
    "rise, and its reward over the last 10 iterations is within 5% of PPO's"
)
SEEDS = [0, 1, 2, 3, 4]

PRETRAINING, STEPS, LR, KL, PTX_COEF, ENOUGH = 1200, 150, 1e-3, 0.02, 0.3, 3
VARIANTS = (("ppo", 0.0), ("ptx", PTX_COEF))
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
    """Pretrain, then PPO without and with the mix from the same network; quick takes a few steps of each."""
    figures: dict[str, Any] = {"seed": seed}
    with temporary() as name:
        root, base = Path(name), Path(name) / "base"
        pretrain(base, seed, 60 if quick else PRETRAINING, layers=2, width=64)
        figures |= state_of(AutoModelForCausalLM.from_pretrained(base), "base", seed)
        questions = beginnings(root / "questions.jsonl", seed)
        for variant, coef in VARIANTS:
            network, rewards = ppo(
                base, root, seed, friendly, steps=3 if quick else STEPS, ptx_coef=coef, kl=KL, lr=LR,
                answers=16 if quick else 128, questions=questions,
            )  # fmt: skip
            figures |= state_of(network, variant, seed)
            figures["reward_base"] = rewards[0]
            figures[f"reward_{variant}"] = sum(rewards[-10:]) / len(rewards[-10:])
            rises = {d: figures[f"loss_{d}_{variant}"] - figures[f"loss_{d}_base"] for d in DOMAINS}
            figures[f"rise_{variant}"] = mean(rises)
    figures["removed"] = 1 - figures["rise_ptx"] / figures["rise_ppo"] if figures["rise_ppo"] else 0.0
    return figures


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """One seed a core, each with one thread, so that the figures do not depend on the number of cores."""
    if len(seeds) == 1:
        return [single(seeds[0], quick)]
    with multiprocessing.get_context("spawn").Pool(min(len(seeds), os.cpu_count() or 1)) as pool:
        return pool.starmap(single, [(seed, quick) for seed in seeds], chunksize=1)


def single(seed: int, quick: bool) -> dict[str, Any]:
    """With one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return one(seed, quick)
    finally:
        torch.set_num_threads(threads)


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Rise of the loss on each domain beside the reward, a point a seed and variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.5), width_ratios=(3, 2))
    for i, (variant, label) in enumerate((("ppo", "PPO"), ("ptx", "PPO-ptx"))):
        for j, d in enumerate(DOMAINS):
            rises = [f[f"loss_{d}_{variant}"] - f[f"loss_{d}_base"] for f in figures]
            left.plot([j + 0.2 * i - 0.1] * len(rises), rises, "o", color=f"C{i}", alpha=0.7, label="" if j else label)
        right.plot([i] * len(figures), [f[f"reward_{variant}"] for f in figures], "o", color=f"C{i}", alpha=0.7)
    left.axhline(0.0, color="black", linewidth=0.8)
    left.set_xticks(range(len(DOMAINS)), DOMAINS)
    left.set_ylabel("rise of held-out loss [nat/token]")
    left.legend()
    right.set_xticks((0, 1), ("PPO", "PPO-ptx"))
    right.set_xlim(-0.5, 1.5)
    right.set_ylim(0, 1.05)
    right.set_ylabel("reward, last 10 iterations")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        f["rise_ppo"] >= 0.15 and f["removed"] >= 0.7 and 0.95 <= f["reward_ptx"] / f["reward_ppo"] <= 1.05
        for f in figures
    )
