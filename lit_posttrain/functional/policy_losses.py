"""Policy-gradient surrogates, unreduced: ``masked.aggregate`` decides how tokens and rows are weighed."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RatioLevel = Literal["token", "sequence", "sequence_product"]
LARGEST_LOG_RATIO = 80.0


class ClippedLoss(NamedTuple):
    """Unreduced terms of the clipped surrogate.

    Attributes:
        per_token: The loss of each token, with gradient; 0 outside the mask.
        ratio: pi / pi_old as the loss used it, detached; 1 outside the mask.
        clipped_low: True where the ratio fell below ``1 - clip_low`` with a negative advantage: no gradient there.
        clipped_high: True where it rose above ``1 + clip_high`` with a positive advantage: no gradient there.
    clipped_dual: True where it rose above ``dual_clip`` with a negative advantage: no gradient there.
    """

    per_token: Float[Tensor, "b t"]
    ratio: Float[Tensor, "b t"]
    clipped_low: Bool[Tensor, "b t"]
    clipped_high: Bool[Tensor, "b t"]
    clipped_dual: Bool[Tensor, "b t"]


def log_ratio(
    log_probs: Float[Tensor, "b t"], old_log_probs: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], level: RatioLevel
) -> Float[Tensor, "b t"]:
    """log(pi / pi_old) of each token, or of its whole sequence repeated at every token; 0 outside the mask.

    Args:
        log_probs: log pi of the sampled tokens; gradients flow through it.
        old_log_probs: log-probs under the policy that sampled them, detached here.
        mask: True where a token counts.
        level: ``token`` (PPO, 1707.06347; GRPO, 2402.03300 Eq. 3); ``sequence``: mean over the sequence's tokens
            (GSPO, 2507.18071 Eq. 7); ``sequence_product``: sum over them, the ratio of whole answers as
            2501.12948 Eq. 1 prints it.
    """
    # Masked before any exp: where() alone would leave 0 * inf = nan in the gradient of the padding.
    per_token = (log_probs - old_log_probs.detach()).where(mask, 0.0)
    if level == "token":
        return per_token
    total = per_token.sum(-1, keepdim=True)
    if level == "sequence":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    elif level != "sequence_product":
        raise ValueError(f"level: {level!r} is none of 'token', 'sequence', 'sequence_product'")
    return total.expand_as(per_token).where(mask, 0.0)


def clipped_policy_loss(
    log_probs: Float[Tensor, "b t"],
    old_log_probs: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    level: RatioLevel,
    clip_low: float,
    clip_high: float,
    dual_clip: float = math.inf,
) -> ClippedLoss:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old (PPO, 1707.06347 Eq. 7).

    With ``old_log_probs`` equal to ``log_probs`` rho is exactly 1 and the gradient that of -A log pi.

    Args:
        log_probs: log pi of the sampled tokens; gradients flow through it.
        old_log_probs: log-probs under the policy that sampled them.
        advantages: Credit of each token, detached here.
        mask: True where a token counts; what the other arguments hold elsewhere changes nothing.
        level: What one ratio belongs to; see ``log_ratio``.
        clip_low: Lower half-width, > 0. At 1 and above the lower bound never binds.
        clip_high: Upper half-width, > 0.
        dual_clip: With a negative advantage rho counts at most so much, > 1 (1912.09729 Eq. 5); infinity never clips.
    """
    # exp overflows fp32 at 88.7 (long answers under sequence_product), and inf * 0 would make clipped gradients nan.
    ratio = log_ratio(log_probs, old_log_probs, mask, level).clamp(max=LARGEST_LOG_RATIO).exp()
    credit = advantages.detach().where(mask, 0.0)
    low, high = 1.0 - clip_low, 1.0 + clip_high
    per_token = -torch.minimum(ratio * credit, ratio.clamp(low, high) * credit)
    ratio = ratio.detach()
    dual = (ratio > dual_clip) & (credit < 0)
    if dual_clip < math.inf:
        per_token = torch.where(dual, -dual_clip * credit, per_token)
    return ClippedLoss(
        per_token=per_token,
        ratio=ratio,
        clipped_low=(ratio < low) & (credit < 0),
        clipped_high=(ratio > high) & (credit > 0),
        clipped_dual=dual,
    )
