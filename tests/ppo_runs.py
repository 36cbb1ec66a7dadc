"""Whole PPO runs on the tiny model."""

from pathlib import Path
from typing import Any

import torch
from tiny_runs import NEW_TOKENS, even

from lit_posttrain.algorithms import PPO
from lit_posttrain.algorithms.evaluation import EvaluationConfig
from lit_posttrain.critic import CriticConfig
from lit_posttrain.objective import KLConfig, RatioConfig
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.ppo_objective import GAEConfig, PPOObjective, ValueConfig
from lit_posttrain.rewards import PythonReward
from lit_posttrain.rollout import SamplingParams

GROUP = 4


def ppo_objective(
    kl: float | KLConfig = 0.1, placement: Any = "reward", lam: float = 0.95, **overrides: Any
) -> PPOObjective:
    arguments: dict[str, Any] = {
        "ratio": RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
        "kl": kl if isinstance(kl, KLConfig) else KLConfig(estimator="k1", placement=placement, coef=kl),
        "aggregation": "token_mean",
        "gae": GAEConfig(gamma=1.0, lam=lam, whiten_advantages=True, whiten_rewards=False),
        "value": ValueConfig(coef=0.1, clip=0.2),
    }
    return PPOObjective(**{**arguments, **overrides})


def ppo(model: Path, reward: Any = even, *, lr: float = 1e-2, policy: Any = None, **overrides: Any) -> PPO:
    """PPO in fp32 with plain SGD, whose steps are proportional to gradients."""
    arguments: dict[str, Any] = {
        "policy": PolicyConfig(model=str(model), compute_dtype="float32", **(policy or {})),
        "objective": ppo_objective(),
        "critic": CriticConfig(),
        "rewards": [PythonReward(reward, timeout=10.0)] if callable(reward) else list(reward),
        "sampling": SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0),
        "group_size": GROUP,
        "evaluation": EvaluationConfig(samples=2),
        "optimizer": lambda params: torch.optim.SGD(params, lr=lr),
    }
    return PPO(**{**arguments, **overrides})
