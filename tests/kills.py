"""Runs that are killed or stopped at a chosen point and started again, and what has to come out alike."""

import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from events import logger_from
from lightning.pytorch.callbacks import Callback
from tiny_runs import scalars, trainer

from lit_posttrain import callbacks
from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint

Tick = Callable[[str, int], None]


class Between(Callback):
    def __init__(self, tick: Tick):
        self.tick = tick

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.tick("between", trainer.global_step)


def ignore(name: str, step: int) -> None:
    """Nothing happens."""


class At:
    """Sends a signal to its own process at the n-th tick of this name and step."""

    def __init__(self, name: str, step: int, number: int = signal.SIGKILL, nth: int = 1):
        self.name, self.step, self.number, self.left = name, step, number, nth

    def __call__(self, name: str, step: int) -> None:
        if (name, step) == (self.name, self.step):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)


def start(build: Callable[[], tuple[Any, Any]], folder: Path, tick: Tick, steps: int) -> None:
    """One start of the program: from the newest checkpoint if there is one.

    Args:
        build: Makes the module and its data.
        folder: Of the run.
        tick: Told of every save and of the time between iterations.
        steps: Iterations of the whole run.
    """
    warnings.simplefilter("ignore")
    save = callbacks.save_state

    def saving(state: Any, path: Path) -> Any:
        tick("before save", state["global_step"])
        out = save(state, path)
        tick("after save", state["global_step"])
        return out

    callbacks.save_state = saving
    found = newest_checkpoint(folder / "version_0", report=lambda m: pytest.fail(m))
    logger = logger_from(folder, found)
    run = trainer(folder, Between(tick), CheckpointEvery(1, keep_last=2), logger=logger, max_steps=steps)
    module, data = build()
    run.fit(module, data, ckpt_path=found and found.state)


def record(module: Any, folder: Path, tick: Tick) -> None:
    """Have every update write its loss and gradient norm, and tick around it."""
    optimize = module.optimize

    def recorded(*arguments: Any, last: bool, **rest: Any) -> Any:
        step = module.trainer.global_step
        tick("before update", step)
        out = optimize(*arguments, last=last, **rest)
        entry = {"step": step, "last": last, "loss": out.metrics["loss"].hex(), "norm": out.grad_norm.hex()}
        with (folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        tick("last update" if last else "update", step)
        return out

    module.optimize = recorded


def losses(folder: Path) -> dict[Any, Any]:
    """All losses of all starts, which must agree."""
    found: dict[Any, Any] = {}
    for line in (folder / "history.jsonl").read_text().splitlines():
        entry = json.loads(line)
        key, value = (entry["step"], entry["last"]), (entry["loss"], entry["norm"])
        assert found.setdefault(key, value) == value, f"update {key} was computed again and came out differently"
    return found


def bits(folder: Path, tags: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """What was logged under ``train/``, bit for bit."""
    logged = scalars(folder)
    return {tag: [(step, v.hex()) for step, v in logged[f"train/{tag}"]] for tag in tags}


def saved(folder: Path) -> tuple[int, dict[str, Any], str]:
    """Step, content and hash of the newest checkpoint."""
    newest = newest_checkpoint(folder / "version_0", report=lambda m: pytest.fail(m))
    assert newest is not None
    state = torch.load(newest.state, weights_only=True)
    parts = [state[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "lit_posttrain")]
    return newest.step, state, hashlib.sha256(repr(list(flat(parts))).encode()).hexdigest()


def flat(value: Any) -> Any:
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from flat(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    else:
        yield value.tolist() if isinstance(value, torch.Tensor) else value
