"""GRPO and its relatives: everything that tells them apart is in the objective."""

from typing import Any, final

from torch import Tensor

from lit_posttrain.algorithms.online import OnlineModule
from lit_posttrain.functional.masked import Totals
from lit_posttrain.objective import Objective
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards.base import RewardFunction
from lit_posttrain.rollout.collect import Rollout
from lit_posttrain.rollout.engine import SamplingParams
from lit_posttrain.types import Loss, MicroBatch


@final
class GRPO(OnlineModule):
    """J = E[1/G sum_i 1/|o_i| sum_t min(rho A, clip(rho) A) - beta KL] (DeepSeekMath, 2402.03300 Eq. 3 and 4).

    Dr. GRPO (2503.20783), DAPO's aggregation and clipping (2503.14476), GSPO's ratio (2507.18071), RLOO's baseline
    (2402.14740) and DeepSeek-R1-Zero (2501.12948) are settings of ``objective``.
    """

    objective: Objective  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        policy: PolicyConfig,
        objective: Objective,
        rewards: list[RewardFunction],
        sampling: SamplingParams,
        group_size: int,
        **kwargs: Any,
    ):
        """As :class:`~lit_posttrain.algorithms.online.OnlineModule`.

        Args:
            policy: The network that is trained.
            objective: Advantage, ratio, KL and aggregation.
            rewards: Judge the samples; their weighted scores add up to the reward.
            sampling: How completions are drawn.
            group_size: Completions of each prompt.
            **kwargs: Further arguments.
        """
        super().__init__(policy, objective, rewards, sampling, group_size, **kwargs)

    def credit(self, rollout: Rollout, scored: dict[str, Tensor]) -> dict[str, Tensor]:
        """A_i from the group's rewards, KL subtracted first where the objective puts it in the reward."""
        judgement = rollout.judgement
        old, ref = scored.get("old_log_probs"), scored.get("ref_log_probs")
        rewards = self.objective.shaped_rewards(judgement.rewards, old, ref, rollout.mask, self.kl_coef)
        advantages = self.objective.advantages(rewards, judgement.valid, self.group_size)
        return {"advantages": advantages[:, None] * rollout.mask}

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """The objective on one micro-batch."""
        arguments = batch.sequences, batch.mask, self.sampling.temperature
        return self.policy_loss(batch, totals, self.built_policy()(*arguments, **self.scoring()))
