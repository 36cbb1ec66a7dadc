"""Whole runs of the algorithms that learn from fixed examples, on the tiny model."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from tiny_runs import trainer

from lit_posttrain.algorithms import DPO, KTO, SFT, PointwiseRewardModel, ProcessRewardModel, RewardModel
from lit_posttrain.algorithms.generations import GenerationConfig
from lit_posttrain.data import (
    PointwiseLabels,
    Preferences,
    StepwiseSupervision,
    SupervisedExamples,
    UnpairedPreferences,
)
from lit_posttrain.policy import PolicyConfig

FEW = GenerationConfig(prompts=2, max_new_tokens=4)


def demonstration(i: int) -> dict[str, Any]:
    return {"prompt": f"Say {'ab'[i % 2] * (i % 4 + 1)}{i}:", "completion": f" {i * 7 % 100} and {'x' * (i % 5)}."}


def pair(i: int) -> dict[str, Any]:
    return {**demonstration(i), "chosen": f" yes {i}", "rejected": f" no{'!' * (i % 3)}"}


def ranking(i: int) -> dict[str, Any]:
    count = 3 + i % 3
    return {
        "prompt": f"Rank {i}:",
        "completions": [f" {j}{'z' * (j * i % 4)}" for j in range(count)],
        "scores": [float(j * 3 % 4) for j in range(count)],
    }


def labelled(i: int) -> dict[str, Any]:
    return {**demonstration(i), "label": i % 3 > 0}


def chain(i: int) -> dict[str, Any]:
    return {
        "prompt": f"Solve {i}.",
        "completions": ["one", "two!", "three"][: 1 + i % 3],
        "labels": [True, i % 2 == 0, False][: 1 + i % 3],
    }


KINDS: dict[str, tuple[type[Any], type[Any], Callable[[int], dict[str, Any]]]] = {
    "sft": (SFT, SupervisedExamples, demonstration),
    "rm": (RewardModel, Preferences, ranking),
    "dpo": (DPO, Preferences, pair),
    "kto": (KTO, UnpairedPreferences, labelled),
    "safety": (PointwiseRewardModel, PointwiseLabels, labelled),
    "prm": (ProcessRewardModel, StepwiseSupervision, chain),
}
SHOWS = ("sft", "dpo", "kto")


def write(path: Path, row: Callable[[int], dict[str, Any]], count: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row(i) for i in range(count)]
    drop = ("completion",) if "chosen" in rows[0] else ()
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k not in drop}) + "\n" for r in rows))
    return path


def module(kind: str, model: Path, *, lr: float = 1e-2, policy: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """In fp32 with plain SGD, whose steps are proportional to gradients."""
    arguments: dict[str, Any] = {
        "policy": PolicyConfig(model=str(model), compute_dtype="float32", **(policy or {})),
        "optimizer": lambda params: torch.optim.SGD(params, lr=lr),
        **({"generations": FEW} if kind in SHOWS else {}),
    }
    return KINDS[kind][0](**{**arguments, **overrides})


def data(kind: str, model: Path, folder: Path, **overrides: Any) -> Any:
    arguments: dict[str, Any] = {"batch_size": 4, "tokenizer": str(model), "held_out_percent": 0, "val_size": 0}
    if not {"dataset", "datasets"} & overrides.keys():
        arguments["dataset"] = str(write(folder / f"{kind}.jsonl", KINDS[kind][2]))
    return KINDS[kind][1](**{**arguments, **overrides})


def fit(model: Any, examples: Any, folder: Path, *callbacks: Callback, **overrides: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, *callbacks, **overrides).fit(model, examples)
    return model


def trained(kind: str, tiny: Path, folder: Path, *callbacks: Callback, steps: int = 2, **overrides: Any) -> Any:
    """A module after a few steps in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = overrides.pop("data", None) or data(kind, tiny, folder)
    return fit(module(kind, tiny, **overrides), examples, folder, *callbacks, max_steps=steps)
