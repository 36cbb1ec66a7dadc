"""E14: small and aligned beats large and only pretrained (InstructGPT, 2203.02155, section 4.1), in the small world."""

import random
from pathlib import Path
from typing import Any

import torch
from cores import one_a_core
from labels import comparisons, reward_model
from sentiment import (
    Checkpoints,
    gold,
    log_probs,
    preferred_ft,
    prefixes,
    sample,
    write,
)
from small_world import BAD, GOOD, NOUNS, PLAIN, VERBS, held_out, ppo, pretrain, temporary, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

CLAIM = (
    "By the gold judge's pairwise preference PPO and PPO-ptx on a learned reward beat SFT, which beats the pretrained "
    "network, and the small PPO-ptx network beats a pretrained one at least 8 times its size."
)
CRITERION = (
    "in every seed the gold-judged win rates of PPO over SFT, PPO-ptx over SFT, SFT over the small pretrained network "
    "and small PPO-ptx over the large pretrained network have 95% confidence intervals above one half over the "
    "held-out prompts, and the large network has at least 8 times the parameters"
)
SEEDS = [0, 1, 2, 3, 4]

SMALL, LARGE = {"layers": 2, "width": 64}, {"layers": 3, "width": 160}
PRETRAINING, PREFIXES, HELD_OUT, COUNT = 800, 2000, 512, 4
SFT_STEPS, PPO_STEPS, LR, KL, PTX_COEF = 60, 60, 5e-4, 0.1, 0.3
COMPARISONS, EPOCHS, REWARD_LR = 10000, 2, 1e-3
VARIANTS = (("ppo", 0.0), ("ptx", PTX_COEF))
# Whose win rate over whom is measured; the criterion names the first four.
DUELS = (
    ("ppo", "sft"),
    ("ptx", "sft"),
    ("sft", "base"),
    ("ptx", "large_base"),
    ("ptx", "ppo"),
    ("ptx", "large_sft"),
    ("large_sft", "sft"),
)
DECIDING = [f"{a}_over_{b}" for a, b in DUELS[:4]]


def demonstration(prefix: str, rng: random.Random) -> str:
    """How a labeller goes on: two sentences whose adjectives are good ones half of the time, and an end."""

    def phrase() -> str:
        kind = rng.choices((GOOD, PLAIN, BAD), (0.5, 0.35, 0.15))[0]
        return f"the {rng.choice(kind)} {rng.choice(NOUNS)}"

    # The prefix ends anywhere in a sentence: the, adjective, noun, verb, the, adjective, noun, full stop.
    at = (len(prefix.split()) - 1) % 8
    sentence = f"{phrase()} {rng.choice(VERBS)} {phrase()} .".split()
    return " ".join([*sentence[at:], *f"{phrase()} {rng.choice(VERBS)} {phrase()} .".split()])


def demonstrations(prompts: list[str], seed: int) -> list[dict[str, Any]]:
    """One for every prompt, as token ids."""
    words, rng = tokenizer(), random.Random(f"demonstrations {seed}")
    return [
        {
            "prompt_ids": words(p).input_ids,
            "chosen_ids": [*words(demonstration(p, rng)).input_ids, words.eos_token_id],
        }
        for p in prompts
    ]


def fine_tuned(base: Path, folder: Path, rows: Path, seed: int, steps: int) -> Path:
    """SFT on the demonstrations; the folder of the network."""
    folder.mkdir()
    kept: list[Any] = []
    preferred_ft(base, folder, rows, seed, steps, Checkpoints(base, steps, kept.append))
    kept[-1].save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def load(folder: Path) -> Any:
    """A network."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(root: Path, prompts: list[str], seed: int, quick: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """All networks, and what PPO's last iterations earned."""
    rows = write(root / "demonstrations.jsonl", demonstrations(prompts, seed))
    folders: dict[str, Path] = {}
    for prefix, size in (("", SMALL), ("large_", LARGE)):
        base = folders[f"{prefix}base"] = root / f"{prefix}base"
        pretrain(base, seed, 20 if quick else PRETRAINING, **size)
        steps = 2 if quick else SFT_STEPS
        folders[f"{prefix}sft"] = fine_tuned(base, root / f"{prefix}sft", rows, seed, steps)
    networks = {name: load(folder) for name, folder in folders.items()}
    # Labellers compare what the fine-tuned network writes, as in the paper.
    pairs = write(root / "pairs.jsonl", comparisons(networks["sft"], prompts, COMPARISONS, seed, gold))
    reward = reward_model(folders["sft"], root / "reward", pairs, seed, EPOCHS, REWARD_LR)
    questions = write(root / "questions.jsonl", [{"question": p} for p in prompts])
    proxy = {}
    for variant, coef in VARIANTS:
        networks[variant], rewards = ppo(
            folders["sft"], root, seed, reward, steps=2 if quick else PPO_STEPS, ptx_coef=coef, kl=KL, lr=LR,
            answers=16 if quick else 128, questions=questions,
        )  # fmt: skip
        proxy[f"proxy_{variant}"] = sum(rewards[-10:]) / len(rewards[-10:])
    return networks, proxy


def win_rate(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Share of comparisons won, a tie being half of one, with its 95% interval over prompts.

    Args:
        ours: Gold rewards [prompts, samples].
        theirs: Of the other network on the same prompts; sample meets sample in the order they were drawn.
    """
    each = ((ours > theirs).float() + 0.5 * (ours == theirs)).mean(1)
    half = 1.96 * float(each.std()) / len(each) ** 0.5
    return float(each.mean()), float(each.mean()) - half, float(each.mean()) + half


def one(seed: int, quick: bool) -> dict[str, Any]:
    """Train everything and let the gold judge compare; quick takes a few steps of each."""
    figures: dict[str, Any] = {"seed": seed}
    prompts, asked = prefixes(seed, 64 if quick else PREFIXES, 16 if quick else HELD_OUT)
    with temporary() as name:
        networks, proxy = train(Path(name), prompts, seed, quick)
    drawn = {n: sample(network, asked, COUNT, 1.0, seed + i) for i, (n, network) in enumerate(networks.items())}
    golds = {n: torch.tensor([gold(t) for t in each.texts]).view(-1, COUNT) for n, each in drawn.items()}
    figures |= {f"gold_{n}": float(each.mean()) for n, each in golds.items()} | proxy
    for a, b in DUELS:
        rate, low, high = win_rate(golds[a], golds[b])
        figures |= {f"{a}_over_{b}": rate, f"{a}_over_{b}_low": low, f"{a}_over_{b}_high": high}
    for variant, _ in VARIANTS:
        both = (log_probs(networks[n], drawn[variant]) for n in (variant, "sft"))
        figures[f"kl_{variant}"] = float(next(both).mean() - next(both).mean())
    for n in ("base", "sft", "ppo", "ptx", "large_base"):
        figures |= {f"loss_{d}_{n}": loss for d, loss in held_out(networks[n], seed).items()}
    sizes = [sum(p.numel() for p in networks[n].parameters()) for n in ("large_base", "base")]
    return {**figures, "parameters_large": sizes[0], "parameters_small": sizes[1], "times": sizes[0] / sizes[1]}


def run(seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """One seed a core."""
    return one_a_core(one, seeds, quick)


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Win rates with their intervals, a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.8))
    for i, (a, b) in enumerate(DUELS):
        for j, f in enumerate(figures):
            rate, low, high = (f[f"{a}_over_{b}{end}"] for end in ("", "_low", "_high"))
            place = i + 0.12 * (j - (len(figures) - 1) / 2)
            axes.errorbar(place, rate, [[rate - low], [high - rate]], fmt="o", markersize=4, color=f"C{i}")
    axes.axhline(0.5, color="black", linewidth=0.8)
    names = {"base": "small base", "sft": "small SFT", "ppo": "PPO", "ptx": "PPO-ptx"}
    labels = [" over\n".join(names.get(n, n.replace("_", " ").replace("sft", "SFT")) for n in duel) for duel in DUELS]
    axes.set_xticks(range(len(DUELS)), labels, fontsize=8)
    axes.set_ylabel("gold-judged win rate")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def passed(figures: list[dict[str, Any]]) -> bool:
    """Whether every seed meets CRITERION."""
    return bool(figures) and all(f["times"] >= 8 and all(f[f"{name}_low"] > 0.5 for name in DECIDING) for f in figures)
