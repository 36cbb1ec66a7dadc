"""Comparisons that the gold reward decides without noise, and reward models of them, in the small world."""

import itertools
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sentiment import PAIRS_A_STEP, SETTINGS, sample
from small_world import tokenizer

from lit_posttrain.algorithms import RewardModel
from lit_posttrain.data import Preferences
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards import LearnedReward

COUNT = 4  # samples of each prompt


def comparisons(
    network: Any, prompts: list[str], count: int, seed: int, gold: Callable[[str], float]
) -> list[dict[str, list[int]]]:
    """At most ``count`` pairs of the network's samples of one prompt; ties by gold are not asked about.

    Token ids and not texts, since a completion that was cut has no end token.
    """
    drawn, rng = sample(network, prompts, COUNT, 1.0, seed), random.Random(f"comparisons {seed}")
    rows = []
    for i in range(len(prompts)):
        for a, b in itertools.combinations(range(i * COUNT, (i + 1) * COUNT), 2):
            difference = gold(drawn.texts[a]) - gold(drawn.texts[b])
            if difference:
                chosen, rejected = (a, b) if difference > 0 else (b, a)
                rows.append(
                    {
                        "prompt_ids": drawn.of(a, slice(None, drawn.start)),
                        "chosen_ids": drawn.of(chosen),
                        "rejected_ids": drawn.of(rejected),
                    }
                )
    rng.shuffle(rows)
    return rows[:count]


def reward_model(base: Path, folder: Path, pairs: Path, seed: int, epochs: int, lr: float) -> LearnedReward:
    """Trained by the package on a file of comparisons, from the network in ``base``."""
    folder.mkdir(exist_ok=True)
    count = len(pairs.read_text().splitlines())
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    module = RewardModel(
        policy=PolicyConfig(model=str(base), compute_dtype="float32"), normalise=False, token_budget=8192,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.01),
    )  # fmt: skip
    steps = max(1, epochs * count // PAIRS_A_STEP)
    data = Preferences(dataset=str(pairs), batch_size=min(PAIRS_A_STEP, count), tokenizer=str(base), **SETTINGS)
    fit = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        default_root_dir=str(folder),
    ).fit  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, data)
    module.network().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return LearnedReward(str(folder / "model"), compute_dtype="float32")
