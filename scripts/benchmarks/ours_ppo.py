"""Worker: lit_posttrain's own PPO, held between iterations as ``ours_grpo`` is.

``full`` adds what InstructGPT has and GRPO's benchmark has not: a reward model, and a reference for the KL.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lit_posttrain.algorithms import PPO
from lit_posttrain.critic import CriticConfig
from lit_posttrain.objective import KLConfig, RatioConfig
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.ppo_objective import GAEConfig, PPOObjective, ValueConfig
from lit_posttrain.rewards import LearnedReward, RewardFunction
from lit_posttrain.rollout import SamplingParams
from lit_posttrain.types import Prompt

from .ours_grpo import RATE, Checksum, Driver, Waiting, bare_trainer, static_bytes, view_bytes
from .ours_rollout import make_engine
from .protocol import Channel, Clock, begin, tensor_bytes


class PPODriver(Driver):
    """Prompts have their text, which a reward model reads; what else is in memory is counted."""

    tokenizer: Any = None

    def prompt(self, number: int, ids: list[int]) -> Prompt:
        """With its text."""
        return super().prompt(number, ids)._replace(prompt=self.tokenizer.decode(ids))

    def static_bytes(self, module: Any) -> dict[str, int]:
        """Policy and critic are trained, the reference and the reward model are not."""
        static = static_bytes(module)
        critic = module.built_critic()
        masters_and_gradients = 2 * tensor_bytes(p for _, p in critic.trainable())
        static["critic"] = masters_and_gradients + view_bytes(critic)
        if module.reference is not None:
            static["reference"] = tensor_bytes(module.reference.network.parameters())
        for reward in module.rewards:
            if isinstance(reward, LearnedReward):
                static["reward_model"] = tensor_bytes(reward._scorer.scorer.network.parameters())  # type: ignore[union-attr]
        return static


def build(setup: dict[str, Any]) -> PPO:
    """InstructGPT's step; one epoch and one minibatch, as GRPO's benchmark has."""
    rewards: list[RewardFunction] = [Checksum(weight=0.0 if setup["full"] else 1.0)]
    if setup["full"]:
        rewards.append(LearnedReward(setup["reward_model"], calibration=0, compute_dtype=setup["dtype"]))
    return PPO(
        policy=PolicyConfig(model=setup["model"], compute_dtype=setup["dtype"]),
        critic=CriticConfig(model=setup["reward_model"] if setup["full"] else None),
        objective=PPOObjective(
            ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
            kl=KLConfig(estimator="k1", placement="reward", coef=0.05 if setup["full"] else 0.0),
            aggregation="token_mean",
            gae=GAEConfig(gamma=1.0, lam=0.95, whiten_advantages=True, whiten_rewards=False),
            value=ValueConfig(coef=0.1, clip=0.2),
        ),
        rewards=rewards,
        sampling=SamplingParams(max_new_tokens=setup["new_tokens"]),
        group_size=setup["samples"],
        engine=make_engine(setup["engine"]),
        token_budget=setup["token_budget"],
        optimizer=lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=0.0, fused=True),
    )


def main() -> None:
    """Build module and Trainer; the Driver does the rest."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    pl.seed_everything(setup["seed"])
    driver = PPODriver(channel, Clock(setup["device"]), 0, 1)
    driver.tokenizer = AutoTokenizer.from_pretrained(setup["model"])
    driver.stops = setup["stops"] if setup["full"] else None
    trainer = bare_trainer(setup, driver)
    trainer.fit(build(setup), DataLoader(Waiting(), batch_size=None))


if __name__ == "__main__":
    main()
