"""From scores to credit token by token: shaped rewards, generalised advantages, value loss, KL controllers."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# What one adaptation of the KL coefficient may assume at most (Ziegler et al., 1909.08593, section 2.2).
LARGEST_ERROR = 0.2


class Credit(NamedTuple):
    """What GAE gives.

    Attributes:
        advantages: A_t; 0 outside the mask.
        returns: A_t + V_t, the target of the value function; 0 outside the mask.
    """

    advantages: Float[Tensor, "b t"]
    returns: Float[Tensor, "b t"]


class ValueLoss(NamedTuple):
    """Unreduced value loss.

    Attributes:
        per_token: With gradient; anything outside the mask.
        clipped: True where the clipped prediction's error is the larger one: no gradient there.
    """

    per_token: Float[Tensor, "b t"]
    clipped: Bool[Tensor, "b t"]


def token_rewards(
    scores: Float[Tensor, " b"],
    log_probs: Float[Tensor, "b t"],
    ref_log_probs: Float[Tensor, "b t"] | None,
    mask: Bool[Tensor, "b t"],
    coef: float,
) -> Float[Tensor, "b t"]:
    """R_t = -coef (log pi_t - log pi_ref,t), and the score on top at the last response token (2203.02155 Eq. 2).

    The last token is the end token, or where an answer was cut its last one: never the padding behind it.

    Args:
        scores: Of each answer.
        log_probs: Under the policy that sampled, detached here.
        ref_log_probs: Under the reference; None if no KL is subtracted.
        mask: The answers' tokens; a row without any gets 0 everywhere.
        coef: Weight of the KL, >= 0.
    """
    rewards = torch.zeros_like(log_probs)
    if ref_log_probs is not None and coef:
        rewards = (-coef * (log_probs - ref_log_probs)).detach().where(mask, 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions.where(mask, -1).amax(-1, keepdim=True)
    return torch.where(positions == last, rewards + scores.detach().to(rewards.dtype)[:, None], rewards)


def generalised_advantages(
    rewards: Float[Tensor, "b t"], values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], gamma: float, lam: float
) -> Credit:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = R_t + gamma V_{t+1} - V_t (GAE, 1506.02438 Eq. 16).

    V is 0 after the last token of an answer, a truncated one too: an answer is a whole episode.

    Args:
        rewards: Of each token.
        values: V(state in which the token was drawn), detached here.
        mask: The answers' tokens, one run of True a row.
        gamma: Discount, 0 to 1.
        lam: 1 credits every token with the whole rest of its answer, 0 with one step.
    """
    values = values.detach()
    advantages = torch.zeros_like(values)
    running = following = values.new_zeros(len(values))
    for t in range(mask.shape[1] - 1, -1, -1):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running).where(counts, 0.0)
        following = values[:, t].where(counts, 0.0)
        advantages[:, t] = running
    return Credit(advantages, (advantages + values).where(mask, 0.0))


def clipped_value_loss(
    values: Float[Tensor, "b t"],
    old_values: Float[Tensor, "b t"],
    returns: Float[Tensor, "b t"],
    clip: float | None,
) -> ValueLoss:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) (released code of 1909.08593).

    Args:
        values: V now, with gradient.
        old_values: V when the rollout was scored, detached here.
        returns: Targets, detached here.
        clip: Half-width, > 0; None never clips.
    """
    returns = returns.detach()
    plain = (values - returns).square()
    if clip is None:
        return ValueLoss(plain / 2, torch.zeros_like(plain, dtype=torch.bool))
    old_values = old_values.detach()
    near = (torch.maximum(torch.minimum(values, old_values + clip), old_values - clip) - returns).square()
    return ValueLoss(torch.maximum(plain, near) / 2, near > plain)


def adapted_coef(coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next weight, coef (1 + clip(KL / target - 1, +-0.2) n / horizon) (Ziegler et al., 1909.08593, section 2.2).

    Args:
        coef: The present weight of the KL.
        kl: Mean KL of a sampled answer to the reference, summed over its tokens, in nats; NaN keeps the weight.
        target: KL to steer to, > 0.
        horizon: Answers after which a constant error of 1 would have multiplied the weight by e, > 0.2 ``episodes``.
        episodes: Answers since the last adaptation: answers, not steps.
    """
    if math.isnan(kl):
        return coef
    error = min(max(kl / target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return coef * (1.0 + error * episodes / horizon)


def ended_scores(
    scores: Float[Tensor, " b"], ended: Bool[Tensor, " b"], replacement: float | None, penalty: float
) -> Float[Tensor, " b"]:
    """What answers without an end token are worth: ``replacement`` (-1 in 2403.17031), or their score - ``penalty``.

    Args:
        scores: Of each answer.
        ended: Whether the policy ended the answer itself.
        replacement: Takes the score's place; None keeps it.
        penalty: Subtracted where nothing replaces.
    """
    missing = scores - penalty if replacement is None else torch.full_like(scores, replacement)
    return scores.where(ended, missing)
