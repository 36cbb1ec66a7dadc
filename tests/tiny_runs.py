"""Whole runs on the tiny model: data, module and Trainer in a second or two, and what is read back from them."""

import json
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_posttrain.algorithms import GRPO
from lit_posttrain.algorithms.evaluation import EvaluationConfig
from lit_posttrain.data import Template, VerifiablePrompts
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, RatioConfig
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards import PerSampleReward, PythonReward, RewardFunction
from lit_posttrain.rollout import SamplingParams
from lit_posttrain.types import Sample, StepResult, Verdict

QUESTIONS, BATCH, GROUP, NEW_TOKENS = 12, 2, 4, 6


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of tokens with an even id: a reward that a random model varies in and can learn."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def write_questions(path: Path, count: int = QUESTIONS) -> Path:
    """Questions of different lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{'Say ' * (i % 3 + 1)}{i}?", "answer": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def objective(
    scale: Any = "group_std", aggregation: Any = "sequence_mean", kl: float = 0.0, placement: Any = "loss"
) -> Objective:
    return Objective(
        advantage=AdvantageConfig(baseline="group_mean", scale=scale),
        ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
        kl=KLConfig(estimator="k3", placement=placement, coef=kl),
        aggregation=aggregation,
    )


def grpo(
    model: Path,
    reward: Callable[..., Any] | Sequence[RewardFunction] = even,
    *,
    lr: float = 1e-2,
    temperature: float = 1.0,
    new_tokens: int = NEW_TOKENS,
    policy: dict[str, Any] | None = None,
    **overrides: Any,
) -> GRPO:
    """GRPO in fp32 with plain SGD, whose steps are proportional to gradients."""
    arguments: dict[str, Any] = {
        "policy": PolicyConfig(model=str(model), compute_dtype="float32", **(policy or {})),
        "objective": objective(),
        "rewards": [PythonReward(reward, timeout=10.0)] if callable(reward) else list(reward),
        "sampling": SamplingParams(max_new_tokens=new_tokens, temperature=temperature),
        "group_size": GROUP,
        "evaluation": EvaluationConfig(samples=2),
        "optimizer": lambda params: torch.optim.SGD(params, lr=lr),
    }
    return GRPO(**{**arguments, **overrides})


def prompts(model: Path, folder: Path, **overrides: Any) -> VerifiablePrompts:
    arguments: dict[str, Any] = {
        "template": Template(kind="plain"),
        "dataset": str(write_questions(folder / "questions.jsonl")),
        "batch_size": BATCH,
        "tokenizer": str(model),
        "held_out_percent": 0,
        "val_size": 0,
    }
    if "task" in overrides:
        arguments["dataset"] = None
    return VerifiablePrompts(**{**arguments, **overrides})


def trainer(folder: Path, *callbacks: Callback, **overrides: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "logger": TensorBoardLogger(folder, name="", version=0),
    }
    return pl.Trainer(callbacks=list(callbacks), **{**arguments, **overrides})


def fit(module: GRPO, data: VerifiablePrompts, folder: Path, *callbacks: Callback, **overrides: Any) -> GRPO:
    """Train, two iterations by default; warnings that the tiny model cannot help are silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, *callbacks, **overrides).fit(module, data)
    return module


def weights(module: GRPO) -> dict[str, Tensor]:
    """Values of all parameters."""
    return {name: p.detach().clone() for name, p in module.built_policy().model.named_parameters()}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of the run's event files as (step, value)."""
    events = EventAccumulator(str(folder / "version_0"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curve(folder: Path, tag: str) -> list[float]:
    return [value for _, value in scalars(folder)[tag]]


class Watch(Callback):
    """Calls back after every iteration."""

    def __init__(self, after: Callable[[pl.Trainer, GRPO], None]):
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        self.after(trainer, pl_module)


def child(act: Callable[[], None], seconds: float = 60) -> int:
    """Exit code of a forked process; its threads are set to one first, since a fork hangs in OpenMP otherwise."""

    def start() -> None:
        torch.set_num_threads(1)
        act()

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    return process.exitcode


def trained(model: Path, folder: Path, *callbacks: Callback, steps: int = 2, data: Any = None, **overrides: Any) -> Any:
    """A module after a few iterations in a folder of its own."""
    folder.mkdir()
    return fit(grpo(model, **overrides), data or prompts(model, folder), folder, *callbacks, max_steps=steps)


class Recorder:
    """What ``loss`` was given and what ``optimize`` returned, update by update."""

    def __init__(self, module: Any):
        self.updates: list[list[Any]] = []
        self.results: list[StepResult] = []
        optimize = module.optimize

        def recording(streams: Any, **kwargs: Any) -> StepResult:
            self.updates.append([])
            self.results.append(optimize([s._replace(loss=wrapped(s.loss)) for s in streams], **kwargs))
            return self.results[-1]

        def wrapped(loss: Any) -> Any:
            def recorded(batch: Any, totals: Any) -> Any:
                self.updates[-1].append((batch, totals))
                return loss(batch, totals)

            return recorded

        module.optimize = recording


class Failing(PerSampleReward):
    """The share of even tokens; invalid or absurd for the samples that it chooses."""

    def __init__(self, bad: Any, absurd: float | None = None):
        super().__init__(name="failing")
        self.bad, self.absurd = bad, absurd

    def score(self, sample: Sample) -> Verdict:
        if self.bad(sample):
            return Verdict(0.0, "invalid", "lost") if self.absurd is None else Verdict(self.absurd)
        return Verdict(even([sample.token_ids])[0])
