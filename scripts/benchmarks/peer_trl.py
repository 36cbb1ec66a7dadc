"""Worker: TRL's GRPOTrainer, held between steps until the parent asks for one. Knows nothing of lit_posttrain."""

from __future__ import annotations

from typing import Any

import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from .protocol import Channel, Clock, begin, optimizer_bytes, reward, tensor_bytes, trl_settings


class Driver(TrainerCallback):
    """Blocks before each step until there is a request, and answers after it."""

    def __init__(self, channel: Channel, clock: Clock):
        self.channel, self.clock = channel, clock
        self.trainer: Any = None
        self.tokens, self.generating = 0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is loaded."""
        self.channel.reply(trl=trl.__version__)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for a request; what it would name was fixed at the start."""
        self.channel.receive()
        self.tokens, self.generating = 0, 0.0
        self.clock.start()

    def generated(self, seconds: float) -> None:
        """A call of ``generate`` took so long."""
        self.generating += seconds

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer."""
        measured = self.clock.stop()
        phases = {"rollout": self.generating, "update": measured["seconds"] - self.generating}
        parameters = list(self.trainer.model.parameters())
        static = {
            "parameters": tensor_bytes(parameters),
            "gradients": tensor_bytes(p for p in parameters if p.requires_grad),  # in the parameters' precision
            "optimizer": optimizer_bytes(self.trainer.optimizer),
        }
        self.channel.reply(**measured, tokens=self.tokens, phases=phases, static_bytes=static)


def arguments(setup: dict[str, Any]) -> GRPOConfig:
    """TRL's settings, each for a reason."""
    micro, total = setup["micro_batch"], len(setup["prompts"]) * setup["samples"]
    fixed: dict[str, Any] = {"eos_token_id": None}
    return GRPOConfig(
        # The same work: one update on all samples of a rollout, no reference, full vocabulary, one mean over all
        # tokens ("dapo"), the same learning rate, clipping and optimizer.
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=total // micro,
        num_generations=setup["samples"],
        num_iterations=1,
        max_completion_length=setup["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-6,
        max_grad_norm=1.0,
        disable_dropout=True,
        generation_kwargs=fixed if setup["kind"] == "fixed" else None,
        model_init_kwargs={"dtype": setup["weights"]},
        max_steps=10**6,
        shuffle_dataset=False,
        logging_strategy="no",
        **trl_settings(setup),
    )


def main() -> None:
    """Build the trainer; the Driver does the rest."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    clock = Clock(setup["device"])
    driver = Driver(channel, clock)

    def checksum(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        driver.tokens += sum(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=setup["model"],
        args=arguments(setup),
        reward_funcs=checksum,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(setup["prompts"]))]}),
        processing_class=AutoTokenizer.from_pretrained(setup["model"], padding_side="left"),
        callbacks=[driver],
    )
    driver.trainer = trainer
    adapt(trainer, driver, setup)
    trainer.train()


def adapt(trainer: Any, driver: Driver, setup: dict[str, Any]) -> None:
    """The other side's prompts, token for token; no stop at fixed length; the time that generating takes."""
    for name in ("_tokenize_prompts", "_generate_single_turn", "eos_token_ids"):
        if not hasattr(trainer, name):
            raise RuntimeError(f"GRPOTrainer of trl {trl.__version__} has no {name}; this was written for trl 1.16")
    trainer._tokenize_prompts = lambda prompts: ([list(setup["prompts"][int(p)]) for p in prompts], None, {})
    if setup["kind"] == "fixed":
        # generate fills what is None from the model's config, and TRL masks what follows these ids.
        trainer.model.generation_config.eos_token_id = None
        trainer.eos_token_ids = [-1]
    trainer._generate_single_turn = driver.clock.timed(trainer._generate_single_turn, driver.generated)


if __name__ == "__main__":
    main()
