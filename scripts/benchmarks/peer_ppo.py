"""Worker: PPOTrainer of TRL 1.12, the last that has one; an iteration a request. Knows nothing of lit_posttrain."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from .protocol import Channel, Clock, begin, optimizer_bytes, tensor_bytes, trl_settings, useful_tokens


class Driver(TrainerCallback):
    """Answers after an iteration, and blocks until the next is asked for: the trainer says only when one ends."""

    def __init__(self, channel: Channel, clock: Clock, version: str):
        self.channel, self.clock, self.version = channel, clock, version
        self.trainer: Any = None
        self.tokens, self.generating = 0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is loaded."""
        self.channel.reply(trl=self.version)
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer."""
        measured = self.clock.stop()
        phases = {"rollout": self.generating, "rest": measured["seconds"] - self.generating}
        trainer = self.trainer
        trained = list(trainer.model.parameters())
        static = {
            "parameters": tensor_bytes(trained),
            "gradients": tensor_bytes(p for p in trained if p.requires_grad),  # in the parameters' precision
            "optimizer": optimizer_bytes(trainer.optimizer),
            "reference": tensor_bytes(trainer.ref_model.parameters()),
            "reward_model": tensor_bytes(trainer.reward_model.parameters()),
        }
        self.channel.reply(**measured, tokens=self.tokens, phases=phases, static_bytes=static)
        self._wait()

    def generated(self, seconds: float) -> None:
        """Sampling took so long."""
        self.generating += seconds

    def _wait(self) -> None:
        self.channel.receive()
        self.tokens, self.generating = 0, 0.0
        self.clock.start()


def arguments(config: Any, setup: dict[str, Any]) -> Any:
    """TRL's settings, each for a reason."""
    micro, total = setup["micro_batch"], len(setup["prompts"])
    return config(
        # The same work: one pass and one update on all answers of a rollout, the same KL, value loss and rate.
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=total // micro,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=total * 10**6,
        local_rollout_forward_batch_size=total,  # sampling in one batch is fastest
        response_length=setup["new_tokens"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        vf_coef=0.1,
        learning_rate=1e-6,
        num_sample_generations=0,
        logging_strategy="no",
        **trl_settings(setup),
    )


def main() -> None:
    """Build the trainer; the Driver does the rest."""
    channel = Channel()
    setup = channel.receive()
    if setup["peers"]:
        sys.path.insert(0, setup["peers"])
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if setup["autocast"] else "no"
    import trl
    from trl.experimental.ppo import (  # pyright: ignore[reportMissingImports]: gone from newer ones
        PPOConfig,
        PPOTrainer,
        ppo_trainer,
    )

    begin(setup)
    driver = Driver(channel, Clock(setup["device"]), trl.__version__)
    sample = driver.clock.timed(ppo_trainer.batch_generation, driver.generated)

    def counted(policy: Any, queries: torch.Tensor, *rest: Any) -> Any:
        answers, logits = sample(policy, queries, *rest)
        driver.tokens += useful_tokens(answers[:, queries.shape[1] :], setup["stops"])
        return answers, logits

    ppo_trainer.batch_generation = counted
    tokenizer = AutoTokenizer.from_pretrained(setup["model"], padding_side="left")
    tokenizer.pad_token = setup["padding"]
    weights = getattr(torch, setup["weights"])
    # What is not trained needs no fp32 weights where the trained ones are computed in bf16.
    frozen = torch.bfloat16 if setup["autocast"] else weights
    load, classifier = AutoModelForCausalLM.from_pretrained, AutoModelForSequenceClassification.from_pretrained
    trainer = PPOTrainer(
        args=arguments(PPOConfig, setup),
        processing_class=tokenizer,
        model=load(setup["model"], dtype=weights),
        ref_model=load(setup["model"], dtype=frozen),
        reward_model=classifier(setup["reward_model"], num_labels=1, dtype=frozen),
        value_model=classifier(setup["reward_model"], num_labels=1, dtype=weights),
        train_dataset=Dataset.from_dict({"input_ids": setup["prompts"]}),
        callbacks=[driver],
    )
    driver.trainer = trainer
    # Accelerate puts autocast around the trained networks' forward alone; sampling and scoring profit as well.
    with torch.autocast(setup["device"], torch.bfloat16, enabled=setup["autocast"]):
        trainer.train()


if __name__ == "__main__":
    main()
