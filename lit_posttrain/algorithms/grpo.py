"""GRPO and its relatives: everything that tells them apart is in the objective."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from lit_posttrain.algorithms.online import OnlineModule
from lit_posttrain.functional.masked import Totals
from lit_posttrain.rollout.collect import Rollout
from lit_posttrain.types import Loss, MicroBatch


@final
class GRPO(OnlineModule):
    """J = E[1/G sum_i 1/|o_i| sum_t min(rho A, clip(rho) A) - beta KL] (DeepSeekMath, 2402.03300 Eq. 3 and 4).

    Dr. GRPO (2503.20783), DAPO's aggregation and clipping (2503.14476), GSPO's ratio (2507.18071), RLOO's baseline
    (2402.14740) and DeepSeek-R1-Zero (2501.12948) are settings of ``objective``.
    """

    def advantages(
        self, rollout: Rollout, log_probs: Tensor | None, ref_log_probs: Tensor | None
    ) -> Float[Tensor, " b"]:
        """A_i from the group's rewards, KL subtracted first where the objective puts it in the reward."""
        judgement = rollout.judgement
        rewards = self.objective.shaped_rewards(judgement.rewards, log_probs, ref_log_probs, rollout.mask)
        return self.objective.advantages(rewards, judgement.valid, self.group_size)

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """The objective on one micro-batch."""
        log_probs, old, sums, extremes = self.loss_inputs(batch)
        out = self.objective.policy_loss(
            log_probs,
            old,
            batch.columns.get("ref_log_probs"),
            batch.columns["advantages"],
            batch.mask,
            totals,
            self.sampling.max_new_tokens,
        )
        tokens = max(totals.tokens, 1.0)
        shares = {name: value / tokens for name, value in sums.items()}
        return Loss(out.loss, {**shares, **out.metrics}, extremes)
