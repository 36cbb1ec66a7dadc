"""Worker: TRL's SFTTrainer, RewardTrainer or DPOTrainer, one step on all examples a request.

Knows nothing of lit_posttrain.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from .protocol import Channel, Clock, begin, optimizer_bytes, tensor_bytes, trl_settings

# Tokens of a packed row: TRL's default.
PACKED_ROW = 1024


class TokenDPOTrainer(DPOTrainer):
    """Takes tokens as they are: of the three trainers this one alone has no way to be given them."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset


class Driver(TrainerCallback):
    """Blocks before each step until there is a request, and answers after it."""

    def __init__(self, channel: Any, clock: Clock, checked: list[str]):
        self.channel, self.clock, self.checked = channel, clock, checked
        self.trainer: Any = None
        self.measured: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is loaded."""
        self.channel.reply(trl=trl.__version__)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait; the batch is always the same."""
        self.channel.receive()
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        self.measured = self.clock.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Answer: the step's metrics are there, and what they cost to write down counts for nobody."""
        parameters = list(self.trainer.model.parameters())
        static = {
            "parameters": tensor_bytes(parameters),
            "gradients": tensor_bytes(p for p in parameters if p.requires_grad),  # in the parameters' precision
            "optimizer": optimizer_bytes(self.trainer.optimizer),
        }
        reference = getattr(self.trainer, "ref_model", None)
        if reference is not None:
            static["reference"] = tensor_bytes(reference.parameters())
        metrics = {name: float(logs[name]) for name in self.checked}
        self.channel.reply(**self.measured, static_bytes=static, metrics=metrics)


def rows(task: str, examples: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """What the trainer's data set holds, from the longest to the shortest: micro-batches then hold little padding."""
    made = [row for example in examples for row in _rows(task, example["prompt"], example["completions"])]
    return sorted(made, key=lambda row: -max(map(len, row.values())))


def _rows(task: str, prompt: list[int], completions: list[list[int]]) -> Iterator[dict[str, list[int]]]:
    if task == "sft":
        for completion in completions:
            yield {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        return
    for better, worse in combinations(completions, 2):
        if task == "rm":
            yield {"chosen_ids": prompt + better, "rejected_ids": prompt + worse}
        else:
            yield {"prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse}


def common(setup: dict[str, Any], count: int) -> dict[str, Any]:
    """Settings of all three trainers, each for a reason."""
    size = setup["rows_at_once"]
    return {
        **trl_settings(setup),
        # The same work: one update on all rows, the same learning rate, clipping and optimizer, and neither cut.
        "per_device_train_batch_size": size,
        # Of packed rows there are fewer; the end of an epoch is the end of a step all the same.
        "gradient_accumulation_steps": -(-count // size),
        "train_sampling_strategy": "sequential",
        "learning_rate": setup["rate"],
        "max_grad_norm": 1.0,
        "max_length": PACKED_ROW if setup["packed"] else None,
        "model_init_kwargs": {"dtype": setup["weights"]},
        "max_steps": 10**6,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }


def make_trainer(setup: dict[str, Any], driver: Driver) -> Any:
    """The trainer that belongs to the task."""
    if not hasattr(DPOTrainer, "_prepare_dataset"):
        raise RuntimeError(
            f"DPOTrainer of trl {trl.__version__} has no _prepare_dataset; this was written for trl 1.16"
        )
    data = rows(setup["task"], setup["examples"])
    tokenizer = AutoTokenizer.from_pretrained(setup["model"])
    tokenizer.pad_token = setup["padding"]
    given: dict[str, Any] = {
        "model": setup["model"],
        "train_dataset": Dataset.from_list(data),
        "processing_class": tokenizer,
        "callbacks": [driver],
    }
    settings = common(setup, len(data))
    if setup["task"] == "sft":
        return SFTTrainer(args=SFTConfig(**settings, packing=setup["packed"]), **given)
    if setup["task"] == "rm":
        return RewardTrainer(args=RewardConfig(**settings), **given)
    return TokenDPOTrainer(args=DPOConfig(**settings, precompute_ref_log_probs=setup["cached"]), **given)


def train(setup: dict[str, Any], channel: Any) -> None:
    """Build the trainer; the Driver does the rest."""
    driver = Driver(channel, Clock(setup["device"]), setup["checked"])
    driver.trainer = make_trainer(setup, driver)
    driver.trainer.train()


def main() -> None:
    """Read the setup, and train until the parent ends the process."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    train(setup, channel)


if __name__ == "__main__":
    main()
