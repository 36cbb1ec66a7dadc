"""E14: a small network that is aligned is preferred to one eight times as large (InstructGPT, 2203.02155, 4.1)."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import torch
from sentiment import learned_reward, prefixes, sample, sft, write
from small_world import BAD, GOOD, NOUNS, PLAIN, VERBS, held_out, ppo, pretrain, prose, temporary
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_posttrain.critic import CriticConfig

CLAIM = (
    "By a gold judge, PPO and PPO-ptx are preferred to SFT and SFT to the pretrained network of the same size; PPO-ptx "
    "in small is preferred to a pretrained network at least eight times as large."
)
CRITERION = (
    "in every seed the 95% intervals of these win rates on 512 held-out prompts lie above .5: SFT over base, PPO over "
    "SFT, PPO-ptx over SFT, small PPO-ptx over the large base; and PPO-ptx wins .4 to .6 against PPO"
)
SEEDS = [0, 1, 2, 3, 4]

SMALL, LARGE, RATIO = {"layers": 2, "width": 64}, {"layers": 3, "width": 160}, 8
PRETRAINING, SFT_STEPS, REWARD_STEPS, PPO_STEPS = 600, 60, 200, 80
PPO_LR, KL, PTX_COEF = 1e-3, 0.02, 0.1
PROMPTS, HELD_OUT, TOKENS, DRAWS, SAMPLES = 2000, 512, 24, 4, 4
ARMS = ("base", "sft", "ppo", "ptx", "large", "large_sft")
ABOVE = (("sft", "base"), ("ppo", "sft"), ("ptx", "sft"), ("ptx", "large"))
MATCHES = (*ABOVE, ("ptx", "ppo"), ("ptx", "large_sft"))
ADJECTIVES = {*GOOD, *BAD, *PLAIN}
SENTENCE = [{"the"}, ADJECTIVES, {*NOUNS}, {*VERBS}, {"the"}, ADJECTIVES, {*NOUNS}]


def gold(prompt: str, completion: str) -> float:
    """What the judge likes: good adjectives minus bad ones in whole sentences; anything else costs 1 a piece.

    Only the completion's adjectives count; the prompt is there for the sentence it begins.
    """
    asked = prompt.removeprefix("<s> ").split()
    words = [*asked, *completion.split()]
    score, start = 0.0, 0
    while start < len(words):
        stop = words.index(".", start) if "." in words[start:] else len(words)
        sentence = words[start:stop]
        whole = stop < len(words) and len(sentence) == len(SENTENCE)
        if whole and all(word in allowed for word, allowed in zip(sentence, SENTENCE, strict=True)):
            new = words[max(start, len(asked)) : stop]
            score += sum(w in GOOD for w in new) - sum(w in BAD for w in new)
        else:
            score -= 1
        start = stop + 1
    return score


def demonstrations(prompts: list[str], seed: int) -> list[dict[str, str]]:
    """For each prompt, the continuation that the judge likes best of a few natural ones that are short enough."""
    rng, found = random.Random(f"demonstrations {seed}"), []
    for prompt in prompts:
        begun = (len(prompt.split()) - 1) % (len(SENTENCE) + 1)  # words of the sentence that the prompt breaks off
        drawn = [prose(rng).split()[begun:] for _ in range(DRAWS)]
        short = [" ".join(words) for words in drawn if len(words) < TOKENS]
        if short:
            found.append({"prompt": prompt, "completion": max(short, key=lambda text: gold(prompt, text))})
    return found


def comparisons(network: Any, prompts: list[str], seed: int) -> list[dict[str, list[int]]]:
    """Every pair of a prompt's samples as token ids, the preferred one drawn from sigma(gold difference)."""
    drawn = sample(network, prompts, SAMPLES, 1.0, seed)
    rng, rows = random.Random(f"comparisons {seed}"), []
    for i, prompt in enumerate(prompts):
        for pair in itertools.combinations(range(i * SAMPLES, (i + 1) * SAMPLES), 2):
            better, worse = (gold(prompt, drawn.texts[j]) for j in pair)
            sides = [drawn.of(j) for j in pair]
            chosen, rejected = sides if rng.random() < 1 / (1 + math.exp(worse - better)) else sides[::-1]
            if chosen != rejected:
                asked = drawn.of(pair[0], slice(None, drawn.start))
                rows.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def load(folder: Path) -> Any:
    """A network in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(root: Path, prompts: list[str], seed: int, quick: bool) -> dict[str, Any]:
    """The network of every arm."""
    networks: dict[str, Any] = {}
    shown = write(root / "demonstrations.jsonl", demonstrations(prompts, seed))
    for prefix, size in (("", SMALL), ("large_", LARGE)):
        base, tuned = root / f"{prefix}base", root / f"{prefix}sft"
        pretrain(base, seed, 20 if quick else PRETRAINING, **size)
        sft(base, tuned, shown, seed, 2 if quick else SFT_STEPS)
        networks |= {"large" if prefix else "base": load(base), f"{prefix}sft": load(tuned)}
    pairs = write(root / "pairs.jsonl", comparisons(networks["sft"], prompts, seed))
    reward = learned_reward(root / "sft", root, pairs, seed, 2 if quick else REWARD_STEPS)
    questions = write(root / "questions.jsonl", [{"question": p} for p in prompts])
    for arm, coef in (("ppo", 0.0), ("ptx", PTX_COEF)):
        networks[arm], _ = ppo(
            root / "sft", root, seed, reward, steps=2 if quick else PPO_STEPS, ptx_coef=coef, kl=KL, lr=PPO_LR,
            answers=16 if quick else 128, tokens=TOKENS, questions=questions,
            critic=CriticConfig(model=str(root / "reward"), lr=1e-3),
        )  # fmt: skip
    return networks


def wins(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Share of prompts on which ours is preferred, a tie counting half, and its 95% interval."""
    won = (ours > theirs).double() + 0.5 * (ours == theirs)
    half = 1.96 * float(won.std()) / math.sqrt(len(won))
    return float(won.mean()), float(won.mean()) - half, float(won.mean()) + half


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """Train every arm, sample one completion a held-out prompt, judge; quick takes two steps of each."""
    out = []
    for seed in seeds:
        prompts, asked = prefixes(seed, 160 if quick else PROMPTS, 16 if quick else HELD_OUT)
        with temporary() as name:
            networks = train(Path(name), prompts, seed, quick)
        sizes = {arm: sum(p.numel() for p in networks[arm].parameters()) for arm in ("base", "large")}
        assert sizes["large"] >= RATIO * sizes["base"], sizes
        figures: dict[str, Any] = {"seed": seed, **{f"parameters_{arm}": n for arm, n in sizes.items()}}
        judged: dict[str, Tensor] = {}
        for i, arm in enumerate(ARMS):
            texts = sample(networks[arm], asked, 1, 1.0, seed + 1000 * (i + 1)).texts
            judged[arm] = torch.tensor([gold(p, text) for p, text in zip(asked, texts, strict=True)])
            losses = held_out(networks[arm], seed).values()
            figures |= {f"gold_{arm}": float(judged[arm].mean()), f"loss_{arm}": sum(losses) / len(losses)}
        for ours, theirs in MATCHES:
            rate, low, high = wins(judged[ours], judged[theirs])
            match = f"{ours}_over_{theirs}"
            figures |= {match: rate, f"{match}_low": low, f"{match}_high": high}
        out.append(figures)
    return out


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Win rates with their intervals, a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "base": "base",
        "sft": "SFT",
        "ppo": "PPO",
        "ptx": "PPO-ptx",
        "large": "large base",
        "large_sft": "large SFT",
    }
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    for i, f in enumerate(figures):
        for j, (ours, theirs) in enumerate(MATCHES):
            match = f"{ours}_over_{theirs}"
            bars = [[f[match] - f[f"{match}_low"]], [f[f"{match}_high"] - f[match]]]
            axes.errorbar(j + 0.1 * (i - len(figures) / 2 + 0.5), f[match], bars, fmt="o", color=f"C{i}", markersize=4)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set_xticks(range(len(MATCHES)), [f"{names[a]}\nover {names[b]}" for a, b in MATCHES], fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("win rate by the gold judge")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(
        all(f[f"{ours}_over_{theirs}_low"] > 0.5 for ours, theirs in ABOVE) and 0.4 <= f["ptx_over_ppo"] <= 0.6
        for f in figures
    )
