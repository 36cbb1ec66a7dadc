"""PPO's objective as data: token rewards, generalised advantages, the critic's loss."""

import math
from dataclasses import dataclass
from typing import final

from lit_posttrain.objective import KEY, PolicyObjective


@final
@dataclass(frozen=True, kw_only=True)
class GAEConfig:
    """Generalised advantages (1506.02438) from token rewards and a critic's values.

    Args:
        gamma: Discount, 0 to 1; 1 in all of RLHF.
        lam: GAE's lambda, 0 to 1: 0.95 in the released code of Ziegler et al.; DeepSeek-R1 finds 1 better on reasoning.
        whiten_advantages: Scale the rollout's advantages to mean 0 and population variance 1.
        whiten_rewards: Scale its token rewards to variance 1 and keep their mean.
    """

    gamma: float
    lam: float
    whiten_advantages: bool
    whiten_rewards: bool

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{KEY}.gae.{name}: must lie between 0 and 1, got {value}")


@final
@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """The critic's loss: coef / 2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2).

    Args:
        coef: Its weight beside the policy's loss, > 0.
        clip: Half-width around the values at the beginning of the iteration, > 0; ``.inf`` never clips.
    """

    coef: float
    clip: float

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        if not 0 < self.coef < math.inf:
            raise ValueError(f"{KEY}.value.coef: must be finite and above 0, got {self.coef}")
        if not self.clip > 0:
            raise ValueError(f"{KEY}.value.clip: must be above 0, got {self.clip}; .inf never clips")


@final
@dataclass(frozen=True, kw_only=True)
class PPOObjective(PolicyObjective):
    """PPO's objective for answers: token rewards with KL, GAE, clipped ratio, value loss.

    Args:
        ratio: The clipped importance ratio.
        kl: The pull towards the reference policy; InstructGPT has k1 in the reward.
        aggregation: How tokens and answers are weighed, in the policy's loss and the critic's: ``token_mean`` in PPO.
        constant_length: Tokens that ``constant`` divides by, >= 1. Null: ``sampling.max_new_tokens``.
        entropy_coef: Weight of the policy's entropy at the sampled tokens, >= 0, added to what is maximised.
        gae: From token rewards to advantages.
        value: The critic's loss.
        missing_eos_reward: What an answer scores that was cut before it ended; null lets the rewards say.
        missing_eos_penalty: Subtracted from such an answer's score instead, >= 0.
    """

    gae: GAEConfig
    value: ValueConfig
    missing_eos_reward: float | None = None
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        super().__post_init__()
        if self.kl.placement == "reward" and self.kl.coef and self.kl.estimator != "k1":
            raise ValueError(f"{KEY}.kl.estimator: token rewards take k1, got {self.kl.estimator}")
        if not 0 <= self.missing_eos_penalty < math.inf:
            raise ValueError(
                f"{KEY}.missing_eos_penalty: must be finite and at least 0, got {self.missing_eos_penalty}"
            )
        if self.missing_eos_reward is not None and not math.isfinite(self.missing_eos_reward):
            raise ValueError(f"{KEY}.missing_eos_reward: must be finite, got {self.missing_eos_reward}")
        if self.missing_eos_penalty and self.missing_eos_reward is not None:
            raise ValueError(f"{KEY}.missing_eos_penalty: missing_eos_reward replaces the score; set one of them")
