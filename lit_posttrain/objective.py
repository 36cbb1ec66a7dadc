"""The objective as data: what the YAML says, what the loss evaluates and what ``explain`` renders."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_posttrain.functional.advantages import Baseline, Scale, group_advantages
from lit_posttrain.functional.kl import KLEstimator, kl_estimate
from lit_posttrain.functional.masked import Aggregation, Totals, aggregate
from lit_posttrain.functional.policy_losses import RatioLevel, clipped_policy_loss
from lit_posttrain.functional.returns import LARGEST_ERROR

KLPlacement = Literal["loss", "reward"]
KEY = "model.init_args.objective"


@final
@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """A_i = (r_i - baseline_i) / scale within the answers to one prompt.

    Args:
        baseline: ``group_mean`` (GRPO, Dr. GRPO), ``leave_one_out`` (RLOO: the mean of the other answers) or ``none``.
        scale: ``group_std`` (GRPO; population standard deviation), ``group_sample_std`` (the sample's, ddof 1) or
            ``none`` (Dr. GRPO).
        eps: Added to the standard deviation, >= 0. Not needed against equal rewards, which give exactly 0; 1e-4 is
            what TRL adds.
    """

    baseline: Baseline
    scale: Scale
    eps: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        one_of("advantage.baseline", self.baseline, Baseline)
        one_of("advantage.scale", self.scale, Scale)
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"{KEY}.advantage.eps: must be finite and at least 0, got {self.eps}")
        if self.eps and self.scale == "none":
            raise ValueError(f"{KEY}.advantage.eps: {self.eps} has no effect under scale: none; remove it")


@final
@dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) with rho = pi / pi_old.

    Args:
        level: What one ratio belongs to: ``token`` (PPO, GRPO, DAPO), ``sequence`` (GSPO: the geometric mean over the
            answer's tokens) or ``sequence_product`` (the ratio of whole answers, DeepSeek-R1 Eq. 1 read literally).
        clip_low: Lower half-width, > 0. From 1 on the lower bound never binds (DeepSeek-R1 uses 10).
        clip_high: Upper half-width, > 0; ``.inf`` never clips. DAPO's "clip higher" is 0.28 over 0.2.
        dual_clip: With a negative advantage rho counts at most so much, > 1 (1912.09729 Eq. 5); ``.inf`` never clips.
    """

    level: RatioLevel
    clip_low: float
    clip_high: float
    dual_clip: float = math.inf

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        one_of("ratio.level", self.level, RatioLevel)
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not value > 0:
                raise ValueError(f"{KEY}.ratio.{name}: must be above 0, got {value}; .inf never clips")
        if not self.dual_clip > 1:
            raise ValueError(f"{KEY}.ratio.dual_clip: must be above 1, got {self.dual_clip}; .inf never clips")


@final
@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The pull towards the reference policy: coef times an estimate of KL(pi || pi_ref).

    Args:
        estimator: With d = log pi - log pi_ref of a sampled token: ``k1`` = d, ``k2`` = d^2 / 2, ``k3`` =
            exp(-d) + d - 1 (GRPO's). Inside the loss, k1 has zero expected gradient and k3 that of KL(pi_ref || pi).
        placement: ``loss`` (GRPO: a term of the loss, differentiated) or ``reward`` (InstructGPT: subtracted from the
            reward of the answer, summed over its tokens, not differentiated). Only k1 in the reward converges to
            pi_ref exp(r / coef) / Z.
        coef: Weight, >= 0, in reward units a nat. 0 computes no KL and needs no reference.
        target: KL of a whole answer, in nats, that ``coef`` is adapted to after every iteration (Ziegler et al.,
            1909.08593); null keeps ``coef``. Only where the KL is in the reward.
        horizon: Answers over which it is adapted, > 0.2 times those of an iteration; set it with ``target``.
    """

    estimator: KLEstimator
    placement: KLPlacement
    coef: float
    target: float | None = None
    horizon: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        one_of("kl.estimator", self.estimator, KLEstimator)
        one_of("kl.placement", self.placement, KLPlacement)
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"{KEY}.kl.coef: must be finite and at least 0, got {self.coef}")
        if (self.target is None) != (self.horizon is None):
            raise ValueError(f"{KEY}.kl.target, {KEY}.kl.horizon: set both or none")
        for name, value in (("target", self.target), ("horizon", self.horizon)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{KEY}.kl.{name}: must be finite and above 0, got {value}")
        if self.target is not None and (self.placement != "reward" or self.coef == 0):
            raise ValueError(f"{KEY}.kl.target: adapts a coef above 0 with placement: reward; unset it")

    def check_answers(self, batch_size: int, group_size: int) -> None:
        """See that no iteration can turn the coefficient negative.

        Raises:
            ValueError: The answers of one are too many for the horizon.
        """
        most = LARGEST_ERROR * batch_size * group_size
        if self.horizon is not None and self.horizon <= most:
            raise ValueError(
                f"{KEY}.kl.horizon: counts answers, and must be above {LARGEST_ERROR} * batch_size * group_size = "
                f"{LARGEST_ERROR} * {batch_size} * {group_size} = {most:g}, is {self.horizon:g}: one iteration could "
                "make the coefficient 0 or negative; raise it"
            )


class PolicyLoss(NamedTuple):
    """One micro-batch's share of the step's loss.

    Attributes:
        loss: Scalar with gradient; shares add up over micro-batches and ranks.
        metrics: Detached scalars under TRL's names, shares too: *summed* over micro-batches and ranks they are the
            means over all tokens of the step (``policy_loss``: the aggregated surrogate without its KL term).
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """What objectives of all online algorithms have: ratio, KL, how tokens are averaged.

    Args:
        ratio: The clipped importance ratio.
        kl: The pull towards the reference policy.
        aggregation: How tokens and answers are weighed.
        constant_length: Tokens that ``constant`` divides by.
        entropy_coef: Weight of the entropy bonus.
    """

    ratio: RatioConfig
    kl: KLConfig
    aggregation: Aggregation
    constant_length: int | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        one_of("aggregation", self.aggregation, Aggregation)
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError(f"{KEY}.constant_length: must be at least 1 token, got {self.constant_length}")
        if self.constant_length is not None and self.aggregation != "constant":
            raise ValueError(
                f"{KEY}.constant_length: only aggregation: constant divides by it, not {self.aggregation}; remove it"
            )
        if not 0 <= self.entropy_coef < math.inf:
            raise ValueError(f"{KEY}.entropy_coef: must be finite and at least 0, got {self.entropy_coef}")

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy has to score the answers."""
        return self.kl.coef > 0

    @property
    def compares(self) -> bool:
        """Whether credit comes from comparing the answers to one prompt."""
        return False

    def policy_loss(
        self,
        log_probs: Float[Tensor, "b t"],
        old_log_probs: Float[Tensor, "b t"],
        ref_log_probs: Float[Tensor, "b t"] | None,
        advantages: Float[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
        totals: Totals,
        constant_length: int | None = None,
        entropy: Float[Tensor, "b t"] | None = None,
    ) -> PolicyLoss:
        """-aggregate(min(rho A, clip(rho) A) - coef kl) (GRPO, 2402.03300 Eq. 3; settings give its relatives).

        Args:
            log_probs: Under the current policy, with gradient.
            old_log_probs: Under the policy that sampled the answers (``log_probs.detach()`` at the first update).
            ref_log_probs: Under the reference. Needed where KL is in the loss; elsewhere, if given, only for ``kl``.
            advantages: Credit of each token.
            mask: True where a token counts; what the arguments hold elsewhere changes nothing.
            totals: Counts of the whole optimizer step over all ranks.
            constant_length: ``sampling.max_new_tokens``, used where the objective names no length itself.
            entropy: Of the distributions that the tokens were drawn from, with gradient; read by ``entropy_coef``.
        """
        length = self.constant_length if self.constant_length is not None else constant_length
        if self.aggregation == "constant" and length is None:
            raise ValueError(f"{KEY}.constant_length: give a number of tokens (usually sampling.max_new_tokens)")
        in_loss = self.kl.placement == "loss" and self.kl.coef > 0
        if in_loss and ref_log_probs is None:
            raise ValueError(f"{KEY}.kl.coef: {self.kl.coef} in the loss needs the reference's log-probs")

        r = self.ratio
        terms = clipped_policy_loss(
            log_probs, old_log_probs, advantages, mask, r.level, r.clip_low, r.clip_high, r.dual_clip
        )
        surrogate = aggregate(terms.per_token, mask, self.aggregation, totals, length)
        loss = surrogate
        metrics = {
            "policy_loss": surrogate.detach(),
            "clip_ratio/low_mean": _share(terms.clipped_low, mask, totals),
            "clip_ratio/high_mean": _share(terms.clipped_high, mask, totals),
            "clip_ratio/region_mean": _share(terms.clipped_low | terms.clipped_high, mask, totals),
        }
        if self.ratio.dual_clip < math.inf:
            metrics["clip_ratio/dual_mean"] = _share(terms.clipped_dual, mask, totals)
        if self.entropy_coef:
            if entropy is None:
                raise ValueError(f"{KEY}.entropy_coef: {self.entropy_coef} needs the entropy")
            loss = loss - self.entropy_coef * aggregate(entropy, mask, self.aggregation, totals, length)
        if ref_log_probs is not None and self.kl.coef > 0:
            # Masked first: an infinity in the padding would come back as nan in the gradient.
            kl = kl_estimate(log_probs.where(mask, 0.0), ref_log_probs.where(mask, 0.0), self.kl.estimator)
            metrics["kl"] = _share(kl.detach(), mask, totals)
            if in_loss:
                loss = loss + self.kl.coef * aggregate(kl, mask, self.aggregation, totals, length)
        return PolicyLoss(loss, metrics)


@final
@dataclass(frozen=True, kw_only=True)
class Objective(PolicyObjective):
    """The whole policy-gradient objective: credit, ratio, KL and how tokens are averaged.

    Args:
        advantage: How rewards become credit.
        ratio: The clipped importance ratio.
        kl: The pull towards the reference policy.
        aggregation: ``sequence_mean`` (GRPO: mean over an answer's tokens, then over answers), ``token_mean`` (DAPO:
            every token of the step weighs the same) or ``constant`` (Dr. GRPO: an answer's tokens are summed and
            divided by ``constant_length``).
        constant_length: Tokens that ``constant`` divides by, >= 1. Null: ``sampling.max_new_tokens``.
        entropy_coef: Weight of the policy's entropy at the sampled tokens, >= 0, added to what is maximised.
    """

    advantage: AdvantageConfig

    @property
    def compares(self) -> bool:
        """Whether credit comes from comparing the answers to one prompt."""
        return self.advantage.baseline != "none"

    def shaped_rewards(
        self,
        rewards: Float[Tensor, " b"],
        log_probs: Float[Tensor, "b t"] | None,
        ref_log_probs: Float[Tensor, "b t"] | None,
        mask: Bool[Tensor, "b t"],
        coef: float | None = None,
    ) -> Float[Tensor, " b"]:
        """r_i - coef sum_t kl_it, detached (InstructGPT, 2203.02155 Eq. 2); ``rewards`` unless KL is in the reward.

        Args:
            rewards: Score of each answer.
            log_probs: Under the policy that sampled the answers; not read (may be None) where KL is not in the reward.
            ref_log_probs: Under the reference; likewise.
            mask: The answers' tokens. Rows without any keep their reward.
            coef: Takes the place of ``kl.coef``, which may have been adapted.
        """
        if self.kl.placement != "reward" or self.kl.coef == 0:
            return rewards.detach()
        if log_probs is None or ref_log_probs is None:
            raise ValueError(f"{KEY}.kl.coef: {self.kl.coef} in the reward needs the reference's log-probs")
        kl = kl_estimate(log_probs.detach(), ref_log_probs, self.kl.estimator).where(mask, 0.0).sum(-1)
        return rewards.detach() - (self.kl.coef if coef is None else coef) * kl.to(rewards.dtype)

    def advantages(
        self, rewards: Float[Tensor, " b"], valid: Bool[Tensor, " b"], group_size: int
    ) -> Float[Tensor, " b"]:
        """Credit of each answer; see ``functional.advantages.group_advantages``.

        Args:
            rewards: Shaped rewards; rows ``i * group_size .. (i + 1) * group_size`` answer one prompt.
            valid: False where the reward is unknown; such a row gets 0.
            group_size: Answers a prompt.
        """
        a = self.advantage
        return group_advantages(rewards, valid, group_size, a.baseline, a.scale, a.eps)


def _share(x: Tensor, mask: Bool[Tensor, "b t"], totals: Totals) -> Float[Tensor, ""]:
    """This micro-batch's share of the mean over the step's tokens."""
    return aggregate(x if x.is_floating_point() else x.to(torch.get_default_dtype()), mask, "token_mean", totals)


def one_of(key: str, value: str, choices: Any) -> None:
    """See that a value is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{KEY}.{key}: {value!r} is none of {', '.join(get_args(choices))}")
