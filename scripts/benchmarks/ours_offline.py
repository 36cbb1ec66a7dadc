"""Worker: lit_posttrain's own SFT, RewardModel or DPO under a Lightning Trainer, one step on all examples a request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lit_posttrain.algorithms import DPO, SFT, RewardModel
from lit_posttrain.data.examples import ExampleData
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.types import Example

from .ours_grpo import bare_trainer, static_bytes
from .protocol import Channel, Clock, begin, tensor_bytes


class Given(ExampleData):
    """The other side's examples, token for token, all of them in every step."""

    known = ("prompt", "completions")

    def __init__(self, examples: list[dict[str, Any]], tokenizer: str):
        super().__init__(batch_size=len(examples), held_out_percent=0, val_size=0, tokenizer=tokenizer)
        self.given = examples

    def load_examples(self, split: Any) -> list[dict[str, Any]]:
        """All, for training."""
        return self.given

    def encode(self, row: Any) -> Iterable[Example]:
        """Completions stand from the best to the worst; of one alone there is nothing to prefer."""
        completions = row["completions"]
        masks = [[True] * len(c) for c in completions]
        ranks = [float(-i) for i in range(len(completions))]
        columns: dict[str, Any] = {"preference": ranks} if len(completions) > 1 else {}
        yield Example(row["prompt"], completions, masks, columns, row.origin)

    def content(self, row: Any) -> str:
        """Nothing is held out."""
        return str(row["prompt"])


class Kept(Logger):
    """Keeps the last step's metrics: there is a logger, so that the module computes them as in any run."""

    def __init__(self):
        super().__init__()
        self.metrics: dict[str, float] = {}

    @property
    def name(self) -> str:
        """No folder is made."""
        return "kept"

    @property
    def version(self) -> str:
        """Likewise."""
        return "0"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Under the peer's names, which are without the prefix."""
        self.metrics = {name.removeprefix("train/"): value for name, value in metrics.items()}


class Driver(Callback):
    """Blocks before each step until there is a request, and answers after it."""

    def __init__(self, channel: Any, clock: Clock, kept: Kept, checked: list[str]):
        self.channel, self.clock, self.kept, self.checked = channel, clock, kept, checked

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Everything is loaded."""
        self.channel.reply()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Wait; the batch is always the same."""
        self.channel.receive()
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Answer."""
        measured = self.clock.stop()
        static = static_bytes(pl_module)
        reference = getattr(pl_module, "reference", None)
        if reference is not None and reference.network is not None:
            static["reference"] = tensor_bytes(reference.network.parameters())
        metrics = {name: float(self.kept.metrics[name]) for name in self.checked}
        self.channel.reply(**measured, phases=dict(pl_module.seconds), static_bytes=static, metrics=metrics)


def module(setup: dict[str, Any]) -> Any:
    """The algorithm as a user gets it; the rate alone is given, for both sides alike."""
    common: dict[str, Any] = {
        "policy": PolicyConfig(model=setup["model"], compute_dtype=setup["dtype"]),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=setup["rate"], weight_decay=0.0, fused=True),
        "token_budget": setup["token_budget"],
    }
    if setup["task"] == "sft":
        return SFT(**common)
    if setup["task"] == "rm":
        return RewardModel(normalise=False, **common)  # which only a checkpoint does
    return DPO(reference_cache=setup["reference_cache"], **common)


def train(setup: dict[str, Any], channel: Any) -> None:
    """Build module and Trainer; the Driver does the rest."""
    clock = Clock(setup["device"])
    pl.seed_everything(setup["seed"])
    kept = Kept()
    trainer = bare_trainer(setup, Driver(channel, clock, kept, setup["checked"]), logger=kept)
    trainer.fit(module(setup), datamodule=Given(setup["examples"], setup["model"]))


def main() -> None:
    """Read the setup, and train until the parent ends the process."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    train(setup, channel)


if __name__ == "__main__":
    main()
