"""Controlled sentiment in the small world: an exact gold reward, preferences by it, and what DPO and PPO make of them.

Gold is (good adjectives - bad ones) / sqrt(words), clipped to 3 in size; preferences are Bradley-Terry draws from
differences of it (Rafailov et al., 2305.18290, section 6.1, in small).
"""

import itertools
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from small_world import BAD, GOOD, tokenizer
from small_world import texts as prose_texts
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_posttrain.algorithms import DPO, SFT, RewardModel
from lit_posttrain.algorithms.generations import GenerationConfig
from lit_posttrain.data import Preferences, SupervisedExamples
from lit_posttrain.functional.preference_losses import PairLossOptions
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards import LearnedReward
from lit_posttrain.schedules import Schedule

TOKENS, SAMPLES, PAIRS_A_STEP = 24, 4, 64
SETTINGS: dict[str, Any] = {"held_out_percent": 0, "val_size": 0}


def gold(text: str) -> float:
    """The true reward of a completion."""
    words = text.split()
    balance = sum(w in GOOD for w in words) - sum(w in BAD for w in words)
    return max(-3.0, min(3.0, balance / math.sqrt(max(len(words), 1))))


def judge(completions: list[str], **_: Any) -> list[float]:
    """Gold, as a reward function."""
    return [gold(text) for text in completions]


def prefixes(seed: int, count: int, held_out: int) -> tuple[list[str], list[str]]:
    """Different beginnings of prose of 2 to 8 words, for training and held out."""
    rng = random.Random(f"prefixes {seed}")
    found: dict[str, None] = {}
    for text in prose_texts("prose", 4 * (count + held_out), seed + 20_000):
        found["<s> " + " ".join(text.split()[: rng.randint(2, 8)])] = None
        if len(found) == count + held_out:
            break
    every = list(found)
    rng.shuffle(every)
    return every[held_out:], every[:held_out]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- sampling and scoring, in plain torch -----------------------------------------------------------------------


class Samples(NamedTuple):
    """Completions of prompts, ``count`` of each in a row.

    Attributes:
        texts: Without special tokens.
        ids: Prompts, padded on the left, and completions, padded on the right.
        start: Where completions begin.
    """

    texts: list[str]
    ids: Tensor
    start: int

    def of(self, row: int, where: slice | None = None) -> list[int]:
        """Ids of a completion, without padding; or of another stretch of its row."""
        return [i for i in self.ids[row, where or slice(self.start, None)].tolist() if i]


@torch.no_grad()
def sample(network: Any, prompts: Sequence[str], count: int, temperature: float, seed: int) -> Samples:
    """Draw completions; at temperature 0 the likeliest token is taken."""
    words = tokenizer()
    words.padding_side = "left"
    network.eval()
    batch = words([p for p in prompts for _ in range(count)], return_tensors="pt", padding=True)
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        ids = network.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=TOKENS, **how
        )
    start = batch["input_ids"].shape[1]
    return Samples(words.batch_decode(ids[:, start:], skip_special_tokens=True), ids, start)


@torch.no_grad()
def log_probs(network: Any, drawn: Samples) -> Tensor:
    """Log-probability of every completion, its end token included."""
    ids, start = drawn.ids, drawn.start
    network.eval()
    real = ids != 0
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    logits = network(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits[:, start - 1 : -1]
    picked = logits.float().log_softmax(-1).gather(2, ids[:, start:, None])[..., 0]
    return picked.where(real[:, start:], 0.0).sum(1)


class Point(NamedTuple):
    """Where a policy stands: its gold reward and sequence KL to the reference, a number a held-out prompt."""

    rewards: Tensor
    kls: Tensor

    @property
    def mean(self) -> tuple[float, float]:
        """KL and reward."""
        return float(self.kls.mean()), float(self.rewards.mean())


def measure(network: Any, reference: Any, prompts: Sequence[str], seed: int, count: int = 4) -> Point:
    """Sample at temperature 1 and measure; KL is the mean of log pi / pi_ref on the policy's own samples."""
    drawn = sample(network, prompts, count, 1.0, seed)
    kls = log_probs(network, drawn) - log_probs(reference, drawn)
    rewards = torch.tensor([gold(text) for text in drawn.texts])
    return Point(rewards.view(-1, count).mean(1), kls.view(-1, count).mean(1))


def preferences(reference: Any, prompts: Sequence[str], seed: int) -> list[dict[str, list[int]]]:
    """Every pair of a prompt's samples as token ids, the preferred one drawn from sigma(gold difference).

    Ids and not texts, since a completion that was cut has no end token.
    """
    drawn = sample(reference, prompts, SAMPLES, 1.0, seed)
    rng, rows = random.Random(f"labels {seed}"), []
    for i in range(len(prompts)):
        for a, b in itertools.combinations(range(i * SAMPLES, (i + 1) * SAMPLES), 2):
            first = rng.random() < 1 / (1 + math.exp(gold(drawn.texts[b]) - gold(drawn.texts[a])))
            prompt, *sides = drawn.of(a, slice(None, drawn.start)), *(drawn.of(j) for j in (a, b))
            chosen, rejected = sides if first else sides[::-1]
            if chosen != rejected:
                rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


# --- training, by the package -----------------------------------------------------------------------------------


class Checkpoints(pl.Callback):
    """Hands a copy of the network to ``look`` every so many steps.

    Args:
        base: Folder of the network's configuration.
        every: Steps between two looks.
        look: Gets the copy.
    """

    def __init__(self, base: Path, every: int, look: Callable[[Any], None]):
        self.network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.every, self.look = every, look

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Copy and look."""
        if trainer.global_step % self.every == 0:
            self.network.load_state_dict(pl_module.built_policy().model.state_dict())
            self.look(self.network)


def _fit(module: Any, data: Any, folder: Path, steps: int, callback: pl.Callback, seed: int) -> None:
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
            default_root_dir=str(folder), callbacks=[callback],
        ).fit(module, data)  # fmt: skip


def _learning(base: Path, lr: float) -> dict[str, Any]:
    return {
        "policy": PolicyConfig(model=str(base), compute_dtype="float32"),
        "generations": GenerationConfig(prompts=0),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0),
        "scheduler": lambda o: Schedule(o, decay="constant", warmup_steps=10, warmup_ratio=0.1),
        "token_budget": 8192,
    }


def dpo(
    base: Path, folder: Path, pairs: Path, seed: int, beta: float, steps: int, callback: pl.Callback, lr: float = 3e-4
) -> None:
    """Train by DPO on pairs; the callback sees what comes of it."""
    module = DPO(options=PairLossOptions(beta=beta), **_learning(base, lr))
    data = Preferences(dataset=str(pairs), batch_size=PAIRS_A_STEP, tokenizer=str(base), **SETTINGS)
    _fit(module, data, folder, steps, callback, seed)


def preferred_ft(base: Path, folder: Path, pairs: Path, seed: int, steps: int, callback: pl.Callback) -> None:
    """Fine-tune on the preferred completions of the pairs."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    demonstrations = [
        {"input_ids": r["prompt_ids"] + r["chosen_ids"], "labels": [-100] * len(r["prompt_ids"]) + r["chosen_ids"]}
        for r in rows
    ]
    chosen = write(folder / "chosen.jsonl", demonstrations)
    data = SupervisedExamples(dataset=str(chosen), batch_size=PAIRS_A_STEP, tokenizer=str(base), **SETTINGS)
    _fit(SFT(**_learning(base, 3e-4)), data, folder, steps, callback, seed)


def learned_reward(base: Path, folder: Path, pairs: Path, seed: int, steps: int) -> LearnedReward:
    """A reward model of the pairs, for PPO."""
    how = _learning(base, 3e-4)
    del how["generations"]
    module = RewardModel(normalise=False, **how)
    data = Preferences(dataset=str(pairs), batch_size=PAIRS_A_STEP, tokenizer=str(base), **SETTINGS)
    _fit(module, data, folder, steps, pl.Callback(), seed)
    model = folder / "reward"
    module.network().save_pretrained(model)
    tokenizer().save_pretrained(model)
    return LearnedReward(str(model), compute_dtype="float32")
